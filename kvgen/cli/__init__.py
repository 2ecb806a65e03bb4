"""The command line: the only part of kvgen that touches the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import kvgen
from kvgen.cli.commands import Commands, Group
from kvgen.cli.config import apply_settings, complete_profile

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "generate": (
        'kvgen generate "Once upon a time,"',
        'kvgen generate --chat -p "What is the capital of Japan?" --temperature 0',
        'cat article.txt | kvgen generate -p "In short:" --max-tokens 60',
        "kvgen generate --lines -f prompts.txt --json > completions.jsonl",
        'kvgen generate -m ./my-model -p "def fib(n):" --no-cache --stats',
    ),
    "chat": (
        "kvgen chat",
        'kvgen chat --system "You are a pirate." --markdown --stats',
        'kvgen chat -p "What is the capital of Japan?"',
    ),
    "batch": (
        "kvgen batch prompts.jsonl -o completions.jsonl",
        "kvgen batch prompts.jsonl -o completions.jsonl --resume",
        "cat prompts.jsonl | kvgen batch --temperature 0 --max-tokens 40 | jq -r .completion",
        'kvgen batch questions.jsonl --chat --system "Answer in one word." --unordered > answers.jsonl',
        "Exit codes: 0 success, 1 a failed row or another error, 2 wrong usage, 130 interrupted.",
    ),
    "serve": (
        "kvgen serve",
        "kvgen serve -m ./my-model --port 8000 --max-cache-memory 4GB",
        "curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "Hi"}]}'""",
    ),
    "score": (
        "kvgen score article.txt",
        'kvgen score -p "The capital of France is Paris." --tokens',
        "kvgen score --jsonl texts.jsonl > scores.jsonl",
    ),
    "compare": (
        "kvgen compare",
        "kvgen compare --wrong-pattern",
        "kvgen compare -m ./my-model --dtype bfloat16 --html report.html",
        'kvgen compare -m my_model.py:factory --ids -p "5 17 3" --json',
        "Exit codes: 0 the right pattern is equivalent or declared lossy, 1 it is not or another error, 2 wrong usage.",
    ),
    "bench": (
        "kvgen bench",
        "kvgen bench -m ./my-model --dtype bfloat16 --contexts 16,4096 --html speed.html",
        "kvgen bench --kernels off --json",
    ),
    "inspect": (
        "kvgen inspect",
        "kvgen inspect ./my-model --json",
        "Exit codes: 0 kvgen runs it, 1 it does not or another error, 2 wrong usage.",
    ),
    "convert": (
        "kvgen convert smollm2 --to x-transformers ./smollm2-x",
        "kvgen compare --model ./smollm2-x --wrong-pattern",
    ),
    "config": ("kvgen config", "kvgen --profile fast config --json"),
    "models": (),
    "cache": (),
}


class _Root(Group):
    """The group of all commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{**attributes, "commands": Commands(_EXAMPLES)})


app = typer.Typer(
    cls=_Root,
    help="Generate text with a KV cache that you can trust.",
    epilog=(
        "Exit codes: 0 success, 1 error, 2 wrong usage, 130 interrupted.\n\n"
        "Environment: KVGEN_CACHE_DIR is the folder for downloaded models, KVGEN_OFFLINE=1 forbids the network, "
        "KVGEN_CPU chooses the instructions of the C++ kernels, and KVGEN_MODEL, "
        "KVGEN_TEMPERATURE and so on set defaults of options; see kvgen config."
    ),
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvgen {kvgen.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            envvar="KVGEN_PROFILE",
            help="Use the defaults of this profile; see kvgen config.",
            autocompletion=complete_profile,
        ),
    ] = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from, for example in your own model.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        apply_settings(context, profile)
