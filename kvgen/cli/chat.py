"""`kvgen chat`: a conversation on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kvgen.cli import options
from kvgen.cli.escape import escape_controls
from kvgen.cli.generation_options import CompletionOptions, PromptOptions
from kvgen.cli.groups import takes_groups
from kvgen.cli.markdown import MarkdownWriter
from kvgen.cli.model import ModelOptions
from kvgen.cli.prompts import with_piped_text
from kvgen.cli.render import TextWriter, notes, print_note, terminal, with_prefill_bar
from kvgen.cli.stats import Meter, format_count, format_tokens
from kvgen.errors import ContextError, KvgenError, UsageError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from kvgen import Chunk, Conversation

_MAKE_ROOM = "/undo takes back the last question, /reset forgets the conversation"
_COMMANDS = {
    "/reset": "forget the conversation, but not the system message",
    "/undo": "take back the last question and its answer",
    "/edit": "change the last question, and ask it again",
    "/system": "/system TEXT sets the system message; without TEXT, takes it away",
    "/save": "/save FILE writes the conversation; it asks before it overwrites",
    "/load": "/load FILE goes on with one that was saved",
    "/stats": "positions reused and computed after each answer: on or off",
    "/help": "this list",
    "/quit": "leave; so do /exit and Ctrl-D",
    "//": "//TEXT asks a text that begins with /",
}


@takes_groups(max_tokens=options.NO_LIMIT)
def chat(
    *,
    prompt: Annotated[str | None, Option("--prompt", "-p", help="Ask this alone, and leave.")] = None,
    system: Annotated[str | None, Option(help="A system message.")] = None,
    chat_template: options.ChatTemplateFile = None,
    source: ModelOptions,
    completion: CompletionOptions,
    prompt_cache: options.PromptCache = None,
    markdown: Annotated[bool, Option("--markdown", help="Show answers as formatted text.")] = False,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model, on a terminal. /help lists what can be typed besides questions.

    Each turn hands the whole conversation to the model, and the cache finds what it has already seen.
    """
    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if prompt is None and not on_terminal:
        raise UsageError("chat needs a terminal; give --prompt for one question, or see `kvgen generate --chat`")
    prompt = with_piped_text(prompt, None, notes(quiet=quiet))
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    reading, request = PromptOptions(chat=True, chat_template=chat_template), completion.request()
    reading.check()
    loaded = reading.prepared(source.load(quiet=quiet))

    from kvgen import Conversation

    if loaded.tokenizer.chat_template is None:
        raise UsageError("this checkpoint has no chat template: choose a chat model, or give --chat-template")
    conversation = Conversation(loaded, request)
    conversation.system = system
    if prompt_cache is not None:
        from kvgen.generation.prompt_cache import open_prompt_cache, save_prompt_cache

        conversation.cache = open_prompt_cache(prompt_cache, loaded)
    talk = Talk(conversation, markdown=markdown and sys.stdout.isatty(), stats=stats, quiet=quiet)
    if prompt is not None:
        talk.answer(prompt)
    else:
        talk.run()
    if prompt_cache is not None and conversation.cache is not None:
        save_prompt_cache(prompt_cache, conversation.cache, loaded)


class Talk:
    """Reads lines from a terminal, and answers them."""

    def __init__(self, conversation: Conversation, *, markdown: bool, stats: bool, quiet: bool) -> None:
        """stats: after each answer. quiet: say nothing but answers, errors and what a command asks for."""
        self._conversation, self._markdown, self._stats, self._quiet = conversation, markdown, stats, quiet
        self._file: Path | None = None  # that holds this conversation

    def run(self) -> None:
        """Until /quit or the end of input."""
        session = _session()
        typed = ""
        if not self._quiet:
            print_note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                line = session.prompt("> ", default=typed).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            typed = ""
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    typed = self._command(*line.partition(" ")[::2])
                elif line:
                    self.answer(line.removeprefix("/"))
            except KeyboardInterrupt:
                print_note("stopped; what has come is part of the conversation")
            except ContextError as error:
                print_note(f"{error}: {_MAKE_ROOM}", "red")
            except KvgenError as error:
                print_note(str(error), "red")

    def answer(self, question: str) -> None:
        """Ask, and show the answer as it comes."""
        meter = Meter()
        conversation = self._conversation
        answer = with_prefill_bar(conversation.ask(question), conversation.loaded.model, quiet=self._quiet)
        chunks = _metered(answer, meter)
        with MarkdownWriter(terminal(sys.stdout)) if self._markdown else TextWriter(raw=False) as writer:
            for chunk in chunks:
                writer.write(chunk.text)
        if not self._quiet:
            self._tell(meter)

    def _tell(self, meter: Meter) -> None:
        """Say what became of an answer, where that is not plain to see."""
        lengths = [self._conversation.prompt_tokens, *(chunk.step.positions for chunk in meter.chunks)]
        if any(after < before for before, after in pairwise(lengths)):
            print_note("(--max-context: the middle of the conversation was dropped for this answer)")
        if meter.last.finish_reason == "length":
            print_note(f"(cut off by --max-tokens: {format_tokens(len(meter.chunks))})")
        elif meter.last.finish_reason == "context":
            print_note(f"(cut off: the model's context is full; {_MAKE_ROOM})")
        if self._stats:
            step = meter.chunks[0].step
            print_note(
                f"{step.positions} positions of conversation: {format_count(step.reused)} reused, "
                f"{format_count(step.computed)} computed | {format_tokens(len(meter.chunks))}, "
                f"first after {meter.prefill_seconds:.2f} s"
            )

    def _command(self, name: str, rest: str) -> str:
        """Do what a command says; returns what is to be typed for the user."""
        conversation, rest = self._conversation, rest.strip()
        if name in ("/save", "/load") and not rest:
            raise UsageError(f"{name} needs the name of a file")
        if name == "/reset":
            conversation.reset()
        elif name in ("/undo", "/edit"):
            question = conversation.undo()
            if question is None:
                raise UsageError("there is no question yet")
            if name == "/edit":
                return question
            print_note(f"taken back: {question}")
        elif name == "/system":
            conversation.system = rest
        elif name == "/save":
            self._save(Path(rest).expanduser())
        elif name == "/load":
            file = Path(rest).expanduser()
            conversation.load(file)
            self._file = file
            print_note(f"loaded: {len(conversation.messages)} messages")
        elif name == "/stats":
            self._stats = not self._stats
            print_note(f"stats are {'on' if self._stats else 'off'}")
        elif name == "/help":
            for command, meaning in _COMMANDS.items():
                print_note(f"{command:<8} {meaning}")
        else:
            raise UsageError(f"no command {name}: /help lists them, and /{name} asks a text that begins so")
        return ""

    def _save(self, file: Path) -> None:
        """Write the conversation; over another file only if that is wanted."""
        if file.exists() and file != self._file and not _confirmed(f"{file} is there: overwrite it?"):
            print_note("not saved")
            return
        self._conversation.save(file)
        self._file = file
        print_note(f"saved: {len(self._conversation.messages)} messages")


def _confirmed(question: str) -> bool:
    """Whether the answer is yes; it is no if there is none."""
    try:
        return typer.confirm(escape_controls(question), err=True)
    except typer.Abort:
        return False


def _session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    from kvgen.system import cache_dir

    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    history = folder / "chat-history"
    history.touch(mode=0o600)
    commands = WordCompleter(list(_COMMANDS), meta_dict=_COMMANDS, sentence=True)
    return PromptSession(history=FileHistory(str(history)), completer=commands, complete_while_typing=False)


def _metered(chunks: Iterator[Chunk], meter: Meter) -> Iterator[Chunk]:
    began = time.perf_counter()
    for chunk in chunks:
        meter.add(chunk, began)
        yield chunk
