"""The command line. It alone touches the terminal, and uses of the library only what a user could."""

from __future__ import annotations

from typing import Annotated

import typer

import kvgen
from kvgen.cli.batch import batch
from kvgen.cli.bench import bench
from kvgen.cli.cache import cache
from kvgen.cli.chat import chat
from kvgen.cli.compare import compare
from kvgen.cli.config import complete_profile, config, defaults_of, option_names, read_settings
from kvgen.cli.convert import convert
from kvgen.cli.errors import Group
from kvgen.cli.generate import generate
from kvgen.cli.help import Command
from kvgen.cli.inspect import inspect
from kvgen.cli.models import models
from kvgen.cli.score import score

app = typer.Typer(
    cls=Group,
    help="Generate text with a KV cache that you can trust.",
    epilog=(
        "Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.\n\n"
        "Environment: KVGEN_CACHE_DIR is where fetched models are kept, KVGEN_OFFLINE=1 forbids the network, and "
        "KVGEN_MODEL, KVGEN_TEMPERATURE and so on are defaults of options; see kvgen config."
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
            help="Take defaults from this profile; see kvgen config.",
            autocompletion=complete_profile,
        ),
    ] = None,
    traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Show where an error came from; for a model of your own that fails."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        return
    commands = {name: option_names(command) for name, command in context.command.commands.items()}  # type: ignore[attr-defined]
    settings = read_settings(profile, commands)
    context.obj = {"settings": settings}
    context.default_map = {name: defaults_of(settings, name, names) for name, names in commands.items()}


app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        'kvgen generate "Once upon a time,"\n\n'
        'kvgen generate --chat -p "What is the capital of Japan?" --temperature 0\n\n'
        'cat article.txt | kvgen generate -p "In short:" --max-tokens 60\n\n'
        "kvgen generate --lines -f prompts.txt --json > completions.jsonl\n\n"
        'kvgen generate -m ./my-model -p "def fib(n):" --no-cache --stats'
    ),
)(generate)

app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "kvgen batch prompts.jsonl -o completions.jsonl\n\n"
        "kvgen batch prompts.jsonl -o completions.jsonl --resume\n\n"
        "cat prompts.jsonl | kvgen batch --temperature 0 --max-tokens 40 | jq -r .completion\n\n"
        'kvgen batch questions.jsonl --chat --system "Answer in one word." --unordered > answers.jsonl\n\n'
        "Exit codes: 0 done, 1 a row failed or an error, 2 wrong usage, 130 interrupted."
    ),
)(batch)

app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "kvgen compare\n\n"
        "kvgen compare --wrong-pattern\n\n"
        "kvgen compare -m ./my-model --dtype bfloat16 --html report.html\n\n"
        'kvgen compare -m my_model.py:make --ids -p "5 17 3" --json\n\n'
        "Exit codes: 0 the right pattern is equivalent, 1 it is not or an error, 2 wrong usage."
    ),
)(compare)

app.command(
    cls=Command,
    epilog="Examples:\n\nkvgen convert smollm2 --to x-transformers ./smollm2-x\n\n"
    "kvgen compare --model ./smollm2-x --wrong-pattern",
)(convert)

app.command(
    cls=Command,
    epilog="Examples:\n\nkvgen inspect\n\nkvgen inspect ./my-model --json\n\n"
    "Exit codes: 0 kvgen runs it, 1 it does not or an error, 2 wrong usage.",
)(inspect)

app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "kvgen score article.txt\n\n"
        'kvgen score -p "The capital of France is Paris." --tokens\n\n'
        "kvgen score --jsonl texts.jsonl > scores.jsonl"
    ),
)(score)

app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "kvgen bench\n\n"
        "kvgen bench -m ./my-model --dtype bfloat16 --contexts 16,4096 --html speed.html\n\n"
        "kvgen bench --kernels off --json"
    ),
)(bench)

app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "kvgen chat\n\n"
        'kvgen chat --system "You are a pirate." --markdown --stats\n\n'
        'kvgen chat -p "What is the capital of Japan?"'
    ),
)(chat)

app.command(cls=Command, epilog="Examples:\n\nkvgen config\n\nkvgen --profile fast config --json")(config)

app.add_typer(models, name="models")
app.add_typer(cache, name="cache")
