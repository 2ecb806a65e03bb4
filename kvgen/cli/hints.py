"""What to say to someone who types the option of another program, or an option in another place."""

from __future__ import annotations

from collections.abc import Collection

# Options of peers: llama.cpp, mlx-lm, llm, transformers. Beside each, what does the same here.
_PEERS = {
    "--temp": "--temperature",
    "--n-predict": "--max-tokens",
    "--predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--max-new-tokens": "--max-tokens",
    "--max-length": "--max-tokens",
    "--ctx-size": "--max-context",
    "--num-ctx": "--max-context",
    "--max-kv-size": "--max-context",
    "-c": "--max-context",
    "--keep": "--keep-first",
    "--file": "--prompt-file",
    "--system-prompt": "--system",
    "-sys": "--system",
    "-s": "--seed",
    "--repeat-penalty": "--repetition-penalty",
    "--typical": "--typical-p",
    "--reverse-prompt": "--stop",
    "--stop-sequence": "--stop",
    "--extra-eos-token": "--stop",
    "--cache-type-k": "--kv-dtype",
    "--cache-type-v": "--kv-dtype",
    "--kv-bits": "--kv-dtype",
    "--gpu-layers": "--device",
    "--n-gpu-layers": "--device",
    "--model-draft": "--draft-model",
    "--grammar-file": "--grammar",
    "--schema": "--json-schema",
    "--json-schema-file": "--json-schema",
    "--prompt-cache-file": "--prompt-cache",
    "--conversation": "kvgen chat",
    "--interactive": "kvgen chat",
    "--verbose": "--stats",
    "--num-threads": "--threads",
    "--output-file": "--output",
}
_COMMANDS = {"kvgen chat"}
_BEFORE_THE_COMMAND = ("--profile", "--traceback")


def hint(option: str, command: str, known: Collection[str]) -> str | None:
    """What to write instead of an option that a command does not have; None if nothing comes to mind.

    command: as it was called, for example `kvgen generate`. known: the options that it has.
    """
    if option in _BEFORE_THE_COMMAND:
        program, _, rest = command.partition(" ")
        value = " NAME" if option == "--profile" else ""
        return f"it goes before the command, as in {program} {option}{value} {rest} ..."
    here = _PEERS.get(option.replace("_", "-"), option.replace("_", "-"))
    return f"here it is {here}" if here in known or here in _COMMANDS else None
