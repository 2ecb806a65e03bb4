"""Options that several commands share, as annotated types. Defaults are in `kvgen.generation.settings`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option


def complete_model(incomplete: str) -> list[str]:
    """Complete model names in the shell."""
    from kvgen.hub.inventory import list_models

    return [entry.name for entry in list_models() if entry.name.startswith(incomplete)]


CHECKPOINT = "A .gguf file, a Hugging Face or x-transformers folder, a catalogue name, or a hub id such as owner/name."
NO_LIMIT = -1  # value of --max-tokens

# One constructor for each panel of --help.
_prompt = partial(Option, rich_help_panel="Prompt")
_model = partial(Option, rich_help_panel="Model")
_length = partial(Option, rich_help_panel="When to stop")
_sampling = partial(Option, rich_help_panel="Sampling")
_structure = partial(Option, rich_help_panel="Structure")
_cache = partial(Option, rich_help_panel="Cache and speed")
_output = partial(Option, rich_help_panel="Output")

PromptArgument = Annotated[
    str | None, Argument(metavar="PROMPT", help="Prompt to complete; same as --prompt.", show_default=False)
]
Prompt = Annotated[str | None, _prompt("--prompt", "-p", help="Prompt to complete; - reads it from stdin.")]
PromptFile = Annotated[
    Path | None,
    _prompt(
        "--prompt-file",
        "-f",
        help="Read the prompt from this file, without its last line break; - is stdin. With --prompt as well, the "
        "prompt is the file, a line break, and --prompt.",
    ),
]
Lines = Annotated[bool, _prompt("--lines", help="Complete each line of the file or of stdin as a separate prompt.")]
Chat = Annotated[bool, _prompt("--chat", help="Put the prompt into the checkpoint's chat template, as a user message.")]
System = Annotated[str | None, _prompt(help="Add a system message to the chat template.")]
ChatTemplateFile = Annotated[
    Path | None, _prompt(metavar="FILE", help="Use this Jinja chat template instead of the checkpoint's.")
]
ParseSpecial = Annotated[
    bool,
    _prompt(
        "--parse-special",
        help="Read text like <|im_end|> in the prompt as a special token. Do not use it for text that others wrote.",
    ),
]
Model = Annotated[
    str | None,
    _model(
        "--model",
        "-m",
        help="A .gguf file, a Hugging Face or x-transformers folder, a catalogue name (see kvgen models), or a hub id "
        "such as owner/name. For your own model, file.py:factory, which RUNS the file; factory() must return a "
        "callable model(ids, cache) -> logits, cache.",
        envvar="KVGEN_MODEL",
        show_default="smollm2",
        autocompletion=complete_model,
    ),
]
Server = Annotated[
    str | None,
    _model(
        metavar="URL",
        help="Use the model of a running kvgen serve, which has loaded it: http://HOST:PORT, or unix:PATH.",
    ),
]
TokenizerFile = Annotated[
    str | None, _model(help="Tokenizer for a model without one: a tokenizer.json file, or bytes.")
]
Adapter = Annotated[
    str | None, _model(metavar="DIR", help="Folder of a LoRA adapter (PEFT), which is merged into the weights.")
]
Ids = Annotated[
    bool, _model("--ids", help="Read and write token ids, as in 5 17 3, instead of text; needs no tokenizer.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _model(help="Precision of weights and computation. auto: float32 on a CPU, the checkpoint's precision on a GPU."),
]
Device = Annotated[str, _model(help="Where to compute: cpu, cuda, cuda:1 or mps. auto: CUDA, else MPS, else the CPU.")]
Kernels = Annotated[
    Literal["auto", "cpp", "off"],
    _model(
        help="cpp: compute with C++ kernels, for float32 on a CPU; they round activations to 16 bits (KL 5e-8). off: "
        "PyTorch only. auto: cpp if they are prebuilt or can be compiled, and have the model's mechanisms."
    ),
]
Quantize = Annotated[
    Literal["auto", "none", "int8", "int4"],
    _model(
        help="How to hold the weights. auto: as stored in the checkpoint. int8, int4: quantize floating-point weights "
        "(lossy). none: dequantize integer weights."
    ),
]
KVDtype = Annotated[
    Literal["auto", "bfloat16", "int8"],
    _model(
        help="Precision of cached keys and values. auto: same as the computation. bfloat16 and int8 use half and a "
        "quarter of the memory of float32 (lossy)."
    ),
]
_engine = partial(Option, rich_help_panel="Another library")
Backend = Annotated[
    Literal["native", "transformers", "llama.cpp"],
    _engine(help="What runs the model: kvgen (native), or another library, whose cache is then checked."),
]
EngineCache = Annotated[str, _engine("--cache", help="Which cache of that library. auto: its own choice.")]
Reference = Annotated[
    Literal["native", "transformers", "llama.cpp"] | None,
    _engine(
        help="Also compare uncached logits with this library's on the same checkpoint: how far apart they are, and why."
    ),
]
EngineAttention = Annotated[str, _engine("--attention", help="Which of its implementations of attention.")]
Activations = Annotated[
    Literal["int16", "int8"],
    _model(
        help="Integers to which kernels round activations, where weights are integers. int8: faster prompts (lossy)."
    ),
]
Threads = Annotated[int | None, _model(min=1, max=1024, help="Number of CPU threads.", show_default="one per core")]
MaxTokens = Annotated[
    int,
    _length(
        "--max-tokens",
        "-n",
        min=NO_LIMIT,
        help=f"Maximum number of tokens to generate; {NO_LIMIT} for as many as the context holds.",
    ),
]
Stop = Annotated[list[str] | None, _length(metavar="TEXT", help="Stop before this text. Repeatable.")]
MaxContext = Annotated[
    int | None,
    _length(
        min=2,
        help="Maximum number of positions that the model sees. When the text grows longer, its middle is dropped and "
        "generation continues (lossy).",
        show_default="the model's context, where generation ends",
    ),
]
KeepFirst = Annotated[int, _length(min=0, help="With --max-context: number of tokens to keep at the start.")]
Temperature = Annotated[
    float, _sampling("--temperature", "-t", help="Divide the logits by this; 0 always takes the most likely token.")
]
TopK = Annotated[int, _sampling(help="Sample from the K most likely tokens; 0 for all.")]
TopP = Annotated[
    float, _sampling(help="Sample from the most likely tokens whose probabilities add up to P; 1 for all.")
]
MinP = Annotated[
    float, _sampling(help="Sample from tokens at least P times as likely as the most likely one; 0 for all.")
]
TypicalP = Annotated[
    float,
    _sampling(help="Sample from the tokens closest to the expected surprise, with total probability P; 1 for all."),
]
RepetitionPenalty = Annotated[
    float, _sampling(help="Make tokens of the prompt and the completion less likely; 1 for no penalty.")
]
PresencePenalty = Annotated[float, _sampling(help="Subtract this from the logits of tokens already generated.")]
FrequencyPenalty = Annotated[
    float, _sampling(help="Subtract this from a token's logit for each time it was generated.")
]
LogitBias = Annotated[
    list[str] | None, _sampling(metavar="ID=BIAS", help="Add BIAS to the logit of token ID. Repeatable.")
]
Seed = Annotated[
    int | None,
    _sampling(
        help="Random seed. The same seed on the same machine gives the same text.",
        show_default="random; --stats shows it",
    ),
]
JsonSchema = Annotated[
    Path | None, _structure(metavar="FILE", help="Generate JSON that is valid for the JSON Schema in this file.")
]
Regex = Annotated[str | None, _structure(metavar="TEXT", help="Generate text that matches this regular expression.")]
Grammar = Annotated[
    Path | None,
    _structure(
        metavar="FILE", help="Generate text that follows the grammar in this file, in llguidance's Lark syntax."
    ),
]
Speculate = Annotated[
    Literal["off", "lookup"],
    _cache(
        help="lookup: guess that text continues as it did earlier, and check several guesses in one pass. Faster if "
        "the completion quotes the prompt; does not change the completion."
    ),
]
DraftModel = Annotated[
    str | None,
    _cache(
        metavar="MODEL", help="Smaller model with the same vocabulary that guesses; does not change the completion."
    ),
]
PromptCache = Annotated[
    Path | None,
    _cache(
        metavar="FILE",
        help="Start from the KV cache in this file if it exists, as far as the prompt matches, and write the cache "
        "back at the end.",
    ),
]
NoCache = Annotated[bool, _cache("--no-cache", help="Decode uncached: compute every position again for each token.")]
VerifyCache = Annotated[
    int | None,
    _cache(
        min=1,
        metavar="[=N]",
        help="Compute one cached step in N uncached as well, and stop if they differ; N is 1 if not given.",
    ),
]
Html = Annotated[
    Path | None, _output(metavar="FILE", help="Write a page with plots; needs pip install 'kvgen[report]'.")
]
Json = Annotated[bool, _output("--json", help="Print JSON instead of text, one object per line.")]
Logprobs = Annotated[
    int | None,
    _output(
        min=0,
        metavar="N",
        help="With --json: add log-probabilities of each generated token and of the N most likely ones.",
    ),
]
Stats = Annotated[bool, _output("--stats", help="Print times and position counts on stderr.")]
Raw = Annotated[bool, _output("--raw", help="Do not escape control characters on a terminal.")]
Quiet = Annotated[bool, _output("--quiet", "-q", help="Print nothing on stderr except errors.")]
