"""The options that commands share, as annotated types. Their defaults live in the library's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from kvgen.errors import UsageError


def complete_model(incomplete: str) -> list[str]:
    """Names of models, for the shell's completion."""
    from kvgen.hub.inventory import list_models

    return [entry.name for entry in list_models() if entry.name.startswith(incomplete)]


CHECKPOINT = "A .gguf file, a Hugging Face or x-transformers folder, a name of the catalogue, or a hub id owner/name."
NO_LIMIT = -1  # of --max-tokens

_MODEL = "Model"
_SAMPLING = "Sampling"
_STOP = "When to stop"
_OUTPUT = "Output"
_PROMPT = "Prompt"
_STRUCTURE = "Structure"
_CACHE = "Cache and speed"

Model = Annotated[
    str | None,
    Option(
        "--model",
        "-m",
        help="A .gguf file, a Hugging Face or x-transformers folder, a name of the catalogue (see kvgen models), a hub "
        "id owner/name; or file.py:factory, a model of your own: this RUNS the file, and its function factory() "
        "returns what is called as model(ids, cache) -> logits, cache.",
        envvar="KVGEN_MODEL",
        show_default="smollm2",
        autocompletion=complete_model,
        rich_help_panel=_MODEL,
    ),
]
TokenizerFile = Annotated[
    str | None,
    Option(
        "--tokenizer", help="A tokenizer.json, or bytes, for a model without one of its own.", rich_help_panel=_MODEL
    ),
]
Ids = Annotated[
    bool, Option("--ids", help="Text is token ids, as in 5 17 3: for models without text.", rich_help_panel=_MODEL)
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Option(
        help="Of weights and computation. auto: float32 on a CPU, the checkpoint's own on a GPU.",
        rich_help_panel=_MODEL,
    ),
]
Backend = Annotated[
    Literal["auto", "native", "library", "x-transformers"],
    Option(
        help="What runs the model. native: kvgen's decoder. x-transformers: that library, for its checkpoints. "
        "library: the one that a checkpoint was written for. auto: native wherever that can.",
        rich_help_panel=_MODEL,
    ),
]
Kernels = Annotated[
    Literal["auto", "on", "off"],
    Option(
        help="Compute with kernels in C++, for a CPU and float32, built once for this machine; they round activations "
        "to 16 bits (KL 5e-8). auto: where there is g++. off: torch alone.",
        rich_help_panel=_MODEL,
    ),
]
Quantize = Annotated[
    Literal["auto", "none", "int8", "int4"],
    Option(
        help="auto: weights as they are stored. int8, int4: floats as integers, lossy. none: integers as floats.",
        rich_help_panel=_MODEL,
    ),
]
KVDtype = Annotated[
    Literal["auto", "bfloat16", "int8"],
    Option(
        "--kv-dtype",
        help="Of cached keys and values. auto: that of the computation. bfloat16 and int8 take half and a quarter of "
        "the memory of float32, and are lossy.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_MODEL)]
Threads = Annotated[
    int | None, Option(min=1, max=1024, help="CPU threads.", show_default="one a core", rich_help_panel=_MODEL)
]

PromptArgument = Annotated[
    str | None, Argument(metavar="PROMPT", help="The prompt; the same as --prompt.", show_default=False)
]
Prompt = Annotated[
    str | None,
    Option(
        "--prompt",
        "-p",
        help="The prompt; - reads it from stdin.",
        rich_help_panel=_PROMPT,
    ),
]
PromptFile = Annotated[
    Path | None,
    Option(
        "--prompt-file",
        "-f",
        help="A file with the prompt, without its last line break; - is stdin. With --prompt too: the file, "
        "a line break, the prompt.",
        rich_help_panel=_PROMPT,
    ),
]
Lines = Annotated[
    bool, Option("--lines", help="Each line of the file or of stdin is a prompt.", rich_help_panel=_PROMPT)
]
Chat = Annotated[
    bool,
    Option("--chat", help="Put the prompt into the checkpoint's chat template.", rich_help_panel=_PROMPT),
]
System = Annotated[str | None, Option(help="A system message for the chat template.", rich_help_panel=_PROMPT)]
ChatTemplateFile = Annotated[
    Path | None,
    Option(
        "--chat-template",
        metavar="FILE",
        help="A chat template, in Jinja, instead of the checkpoint's.",
        rich_help_panel=_PROMPT,
    ),
]
ParseSpecial = Annotated[
    bool,
    Option(
        "--parse-special",
        help="Let text like <|im_end|> in the prompt be the special token. Not for text that others wrote.",
        rich_help_panel=_PROMPT,
    ),
]

Temperature = Annotated[
    float,
    Option("--temperature", "-t", help="0 takes the most likely token each time.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[int, Option(help="Only the k most likely tokens; 0 for all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float,
    Option(help="Only the most likely tokens that hold this probability together.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float,
    Option(help="Only tokens at least this likely, as a share of the likeliest.", rich_help_panel=_SAMPLING),
]
TypicalP = Annotated[
    float,
    Option(help="Only tokens of about the expected surprise, up to this probability.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float,
    Option(help="Above 1: tokens of prompt and completion become less likely.", rich_help_panel=_SAMPLING),
]
PresencePenalty = Annotated[
    float, Option(help="Subtracted from the logits of tokens already generated.", rich_help_panel=_SAMPLING)
]
FrequencyPenalty = Annotated[
    float, Option(help="Subtracted once for each time that a token was generated.", rich_help_panel=_SAMPLING)
]
LogitBias = Annotated[
    list[str] | None,
    Option(metavar="ID=BIAS", help="Added to a token id's logit. Repeatable.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    Option(
        help="Same seed, same machine, same text.",
        show_default="a new one, see --stats",
        rich_help_panel=_SAMPLING,
    ),
]

MaxTokens = Annotated[
    int,
    Option(
        "--max-tokens",
        "-n",
        min=NO_LIMIT,
        help=f"The most tokens to generate; {NO_LIMIT} for as many as the context has room for.",
        rich_help_panel=_STOP,
    ),
]
Stop = Annotated[
    list[str] | None,
    Option(metavar="TEXT", help="End before this text. Repeatable.", rich_help_panel=_STOP),
]

JsonSchema = Annotated[
    Path | None,
    Option(
        metavar="FILE", help="A JSON Schema; the completion is JSON that is valid by it.", rich_help_panel=_STRUCTURE
    ),
]
Regex = Annotated[
    str | None,
    Option(metavar="TEXT", help="The completion matches this regular expression.", rich_help_panel=_STRUCTURE),
]
Grammar = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="A grammar in llguidance's Lark syntax, which the completion follows.",
        rich_help_panel=_STRUCTURE,
    ),
]

MaxContext = Annotated[
    int | None,
    Option(
        "--max-context",
        min=2,
        help="Let the model see at most so many positions: what is longer loses its middle, and goes on. Lossy.",
        show_default="the model's own; a completion ends there",
        rich_help_panel=_STOP,
    ),
]
KeepFirst = Annotated[
    int, Option("--keep-first", min=0, help="With --max-context: tokens at the start that stay.", rich_help_panel=_STOP)
]
Speculate = Annotated[
    Literal["off", "lookup"],
    Option(
        help="lookup: guess that text goes on as it did before, and check guesses many at once. Faster where the "
        "completion quotes the prompt; the completion is the same.",
        rich_help_panel=_CACHE,
    ),
]
DraftModel = Annotated[
    str | None,
    Option(
        "--draft-model",
        metavar="MODEL",
        help="Let a smaller model with the same vocabulary guess. The completion is the same.",
        rich_help_panel=_CACHE,
    ),
]
NoCache = Annotated[
    bool,
    Option(
        "--no-cache",
        help="Decode uncached: compute every position anew for each token.",
        rich_help_panel=_CACHE,
    ),
]
PromptCache = Annotated[
    Path | None,
    Option(
        "--prompt-cache",
        metavar="FILE",
        help="Go on from the keys and values in this file, if it exists, as far as the prompt begins like its text, "
        "and write them there at the end.",
        rich_help_panel=_CACHE,
    ),
]
VerifyCache = Annotated[
    int | None,
    Option(
        "--verify-cache",
        min=1,
        metavar="[=N]",
        help="Compute one cached step in N (1 if not given) uncached as well, and stop if they differ.",
        rich_help_panel=_CACHE,
    ),
]
Html = Annotated[
    Path | None,
    Option(metavar="FILE", help="Write a page with plots (extra: report).", rich_help_panel=_OUTPUT),
]
Json = Annotated[bool, Option("--json", help="JSON instead of text, one object a line.", rich_help_panel=_OUTPUT)]
Logprobs = Annotated[
    int | None,
    Option(
        min=0,
        metavar="N",
        help="With --json: log-probabilities of each chosen token and of the N likeliest.",
        rich_help_panel=_OUTPUT,
    ),
]
Stats = Annotated[bool, Option("--stats", help="Times and positions, on stderr.", rich_help_panel=_OUTPUT)]
Raw = Annotated[bool, Option("--raw", help="Do not escape control characters on a terminal.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Nothing on stderr but errors.", rich_help_panel=_OUTPUT)]


def parse_logit_bias(entries: list[str] | None) -> dict[int, float]:
    """`["50256=-100"]` as `{50256: -100.0}`. Raises UsageError."""
    bias = {}
    for entry in entries or []:
        id_, _, value = entry.partition("=")
        try:
            bias[int(id_)] = float(value)
        except ValueError:
            raise UsageError(f"--logit-bias {entry!r}: give a token id and a number, as in 50256=-100") from None
    return bias
