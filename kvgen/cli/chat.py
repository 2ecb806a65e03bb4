"""`kvgen chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kvgen.cli import options
from kvgen.cli.groups import CompletionOptions, ModelOptions, PromptOptions, takes_groups
from kvgen.cli.prompts import with_piped_text
from kvgen.cli.remote import connected
from kvgen.cli.render import TextWriter, escape_controls, notes, print_note, terminal, with_prefill_bar
from kvgen.cli.stats import Meter, format_count, format_tokens
from kvgen.errors import ContextError, KvgenError, UsageError
from kvgen.generation.settings import Request

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from kvgen import Conversation
    from kvgen.cli.markdown import MarkdownWriter

_MAKE_ROOM = "/undo takes back the last question, /reset forgets the conversation"
_COMMANDS = {
    "/reset": "forget the conversation, but keep the system message",
    "/undo": "take back the last question and its answer",
    "/edit": "change the last question and ask it again",
    "/system": "/system TEXT sets the system message; without TEXT, removes it",
    "/save": "/save FILE writes the conversation to a file",
    "/load": "/load FILE continues a saved conversation",
    "/stats": "turn statistics after each answer on or off",
    "/help": "list these commands",
    "/quit": "leave; so do /exit and Ctrl-D",
    "//": "//TEXT asks a question that begins with /",
}


@takes_groups(max_tokens=options.NO_LIMIT)
def chat(
    *,
    prompt: Annotated[str | None, Option("--prompt", "-p", help="Ask one question and exit.")] = None,
    system: Annotated[str | None, Option(help="System message.")] = None,
    chat_template: options.ChatTemplateFile = None,
    source: ModelOptions,
    server: options.Server = None,
    completion: CompletionOptions,
    prompt_cache: options.PromptCache = None,
    markdown: Annotated[bool, Option("--markdown", help="Show answers as formatted Markdown.")] = False,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    """Hold a conversation with a model in the terminal. Type /help for the commands.

    Each turn passes the whole conversation to the model, and the cache reuses everything up to the new question.
    """
    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if prompt is None and not on_terminal:
        raise UsageError("chat needs a terminal: give --prompt for one question, or use kvgen generate --chat")
    prompt = with_piped_text(prompt, None, notes(quiet=quiet))
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    reading, request = PromptOptions(chat=True, chat_template=chat_template), completion.request()
    reading.check()
    conversation, save = (
        _connect(server, source, reading, request, prompt_cache)
        if server
        else _load(source, reading, request, prompt_cache, quiet=quiet)
    )
    if conversation.loaded.tokenizer.chat_template is None:
        raise UsageError("this checkpoint has no chat template: choose a chat model, or give --chat-template")
    conversation.system = system
    talk = Talk(conversation, markdown and sys.stdout.isatty(), stats, quiet)
    if prompt is not None:
        talk.answer(prompt)
    else:
        talk.run()
    save()


def _load(
    source: ModelOptions, reading: PromptOptions, request: Request, prompt_cache: Path | None, *, quiet: bool
) -> tuple[Conversation, Callable[[], None]]:
    """Return a conversation with a model that is loaded here, and a function that saves the prompt cache."""
    loaded = reading.prepared(source.load(quiet=quiet))

    from kvgen import Conversation
    from kvgen.generation.prompt_cache import open_prompt_cache, save_prompt_cache

    cache = None if prompt_cache is None else open_prompt_cache(prompt_cache, loaded)
    conversation = Conversation(loaded, request, cache=cache)

    def save() -> None:
        if prompt_cache is not None and conversation.cache is not None:
            save_prompt_cache(prompt_cache, conversation.cache, loaded)

    return conversation, save


def _connect(
    server: str, source: ModelOptions, reading: PromptOptions, request: Request, prompt_cache: Path | None
) -> tuple[Conversation, Callable[[], None]]:
    """Return a conversation with the model of a server, where nothing is to be saved."""
    remote = connected(server, source, [] if prompt_cache is None else ["prompt_cache"])

    from kvgen.client.remote import RemoteConversation

    return RemoteConversation(reading.prepared(remote), request), lambda: None


@dataclass
class Talk:
    """An interactive conversation.

    stats: print statistics after each answer. quiet: print only answers, errors and the results of commands.
    file: where the conversation was loaded from or saved to.
    """

    conversation: Conversation
    markdown: bool
    stats: bool
    quiet: bool
    file: Path | None = None

    def run(self) -> None:
        """Read and answer lines until /quit or the end of input."""
        session, draft = _new_session(), ""
        if not self.quiet:
            print_note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                line = session.prompt("> ", default=draft).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            draft = ""
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    draft = self._run_command(*line.partition(" ")[::2])
                elif line:
                    self.answer(line.removeprefix("/"))
            except KeyboardInterrupt:
                print_note("stopped; the text so far stays in the conversation")
            except KvgenError as error:
                print_note(f"{error}: {_MAKE_ROOM}" if isinstance(error, ContextError) else str(error), "red")

    def answer(self, question: str) -> None:
        """Ask the model, and stream its answer to stdout."""
        meter, began = Meter(), time.perf_counter()
        answer = with_prefill_bar(self.conversation.ask(question), self.conversation.loaded.model, quiet=self.quiet)
        with _markdown_writer() if self.markdown else TextWriter(raw=False) as writer:
            for chunk in answer:
                meter.add(chunk, began)
                writer.write(chunk.text)
        if not self.quiet:
            self._print_notes(meter)

    def _print_notes(self, meter: Meter) -> None:
        """Print how an answer was cut short, and its statistics."""
        tokens = format_tokens(len(meter.chunks))
        if meter.last.step.dropped:
            print_note("(--max-context: the middle of the conversation was dropped for this answer)")
        if meter.last.finish_reason == "length":
            print_note(f"(cut off by --max-tokens: {tokens})")
        elif meter.last.finish_reason == "context":
            print_note(f"(cut off: the model's context is full; {_MAKE_ROOM})")
        if self.stats:
            step = meter.chunks[0].step
            print_note(
                f"{step.positions} positions of conversation: {format_count(step.reused)} reused, "
                f"{format_count(step.computed)} computed | {tokens}, first after {meter.prefill_seconds:.2f} s"
            )

    def _run_command(self, name: str, rest: str) -> str:
        """Run a command, and return the text to edit in the next prompt."""
        conversation, rest = self.conversation, rest.strip()
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
        elif name in ("/save", "/load"):
            self._save_or_load(name, rest)
        elif name == "/stats":
            self.stats = not self.stats
            print_note(f"stats are {'on' if self.stats else 'off'}")
        elif name == "/help":
            for command, meaning in _COMMANDS.items():
                print_note(f"{command:<8} {meaning}")
        else:
            raise UsageError(f"no command {name}: /help lists the commands; to ask this as a question, type /{name}")
        return ""

    def _save_or_load(self, name: str, path: str) -> None:
        """Save to a file, asking before overwriting a different one, or load from it."""
        if not path:
            raise UsageError(f"{name} needs a file name")
        try:
            file = Path(path).expanduser()
            exists = file.exists()
        except (OSError, RuntimeError) as error:  # name too long, unknown user
            raise UsageError(f"{path[:60]!r} is not a valid path ({error.__class__.__name__})") from None
        if name == "/load":
            self.conversation.load(file)
        elif exists and file != self.file and not _confirm(f"{file} exists: overwrite it?"):
            print_note("not saved")
            return
        else:
            self.conversation.save(file)
        self.file = file
        print_note(f"{'saved' if name == '/save' else 'loaded'}: {len(self.conversation.messages)} messages")


def _markdown_writer() -> MarkdownWriter:
    from kvgen.cli.markdown import MarkdownWriter

    return MarkdownWriter(terminal(sys.stdout))


def _confirm(question: str) -> bool:
    """Ask a yes-or-no question; no answer means no."""
    try:
        return typer.confirm(escape_controls(question), err=True)
    except typer.Abort:
        return False


def _new_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    from kvgen.system import cache_dir

    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    history = folder / "chat-history"
    history.touch(mode=0o600)  # readable by the user only
    commands = WordCompleter(list(_COMMANDS), meta_dict=_COMMANDS, sentence=True)
    return PromptSession(history=FileHistory(str(history)), completer=commands, complete_while_typing=False)
