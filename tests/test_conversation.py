"""`kvgen chat`: each turn pays for what is new, and gives what a fresh run gives."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kvgen
from kvgen import KvgenError, NotFoundError, Sampling, UsageError
from kvgen.cli.markdown import MarkdownWriter
from kvgen.generation.conversation import Conversation
from kvgen.generation.settings import Request
from kvgen.loading.load import Loaded
from kvgen.system import cache_dir
from tests.program import CLOSED, run, run_on_terminal
from tests.sizes import first

GREEDY = Sampling(temperature=0)
QUESTIONS = (
    "What is the capital of Japan?",
    "And of France?",
    "Name a river there.",
    "Count to five.",
    "What is 2 + 2?",
    "Say hello in German.",
    "Which colour is the sky?",
    "Name an animal that flies.",
    "What do bees make?",
    "Thank you, goodbye!",
)


@pytest.fixture
def conversation(smollm2: Loaded) -> Conversation:
    return Conversation(smollm2, Request((), GREEDY, 24, top_logprobs=3))


@pytest.mark.parametrize("turns", first(1, [4, 10]))
def test_turns_compute_what_is_new_and_equal_fresh_runs(
    conversation: Conversation, smollm2: Loaded, turns: int
) -> None:
    known: list[int] = []
    for question in QUESTIONS[:turns]:
        chunks = list(conversation.ask(question))
        prompt = smollm2.tokenizer.encode_chat(conversation.messages[:-1])
        step = chunks[0].step
        shared = next((n for n, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), len(known))
        assert step.reused == shared
        assert step.computed == len(prompt) - shared
        # All of the conversation so far, but the last token, which nothing has been computed after.
        assert shared >= len(known) - 1
        fresh = list(kvgen.stream(smollm2, prompt, GREEDY, max_tokens=24, top_logprobs=3))
        assert [chunk.step.top_logprobs for chunk in chunks] == [chunk.step.top_logprobs for chunk in fresh]
        assert torch.equal(
            smollm2.model(torch.tensor([prompt]), conversation.cache.branch(len(prompt) - 1, 0))[0],
            smollm2.model(torch.tensor([prompt]), None)[0],
        )
        known = [*prompt, *(chunk.step.token for chunk in chunks[:-1])]
    assert len(conversation.messages) == 2 * turns


def test_undo_edit_reset_and_system_change_what_is_rendered(conversation: Conversation) -> None:
    conversation.system = "Be brief."
    list(conversation.ask("one"))
    list(conversation.ask("two"))
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 2]
    assert conversation.undo() == "two"
    assert [message["content"] for message in conversation.messages[:2]] == ["Be brief.", "one"]
    conversation.system = "Be long."
    assert conversation.system == "Be long."
    assert len(conversation.messages) == 3
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be long."}]
    conversation.system = ""
    assert conversation.messages == []
    assert conversation.undo() is None


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(conversation: Conversation) -> None:
    chunks = conversation.ask("Tell me a story.")
    text = next(chunks).text + next(chunks).text
    chunks.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": text}


def test_a_question_that_cannot_be_asked_leaves_no_trace(conversation: Conversation) -> None:
    with pytest.raises(UsageError, match="room for"):
        list(conversation.ask("1" * 8300))
    assert conversation.messages == []


def test_conversations_are_saved_and_loaded(conversation: Conversation, smollm2: Loaded, tmp_path: Path) -> None:
    list(conversation.ask("Who are you? ü"))
    conversation.save(tmp_path / "talk.json")
    other = Conversation(smollm2, conversation.request)
    other.load(tmp_path / "talk.json")
    assert other.messages == conversation.messages
    with pytest.raises(KvgenError, match="cannot be written"):
        conversation.save(tmp_path / "no" / "talk.json")
    with pytest.raises(NotFoundError):
        other.load(tmp_path / "nothing")
    for content in ("{", "[]", '{"messages": [{"role": 3}]}', "[" * 100_000):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UsageError, match="not a conversation"):
            other.load(tmp_path / "bad.json")
    assert other.messages == conversation.messages


# --- The command --------------------------------------------------------------------------------------------------


def test_one_question_in_a_pipe(smollm2_path: Path) -> None:
    found = run("chat", "-p", "What is the capital of Japan?", "-t", "0", "--stats")
    assert (found.returncode, found.stdout) == (0, "The capital of Japan is Tokyo.\n")
    assert re.fullmatch(r"37 positions of conversation: 0 reused, 37 computed \| 8 tokens, .*\n", found.stderr)


def test_it_does_not_start_in_a_pipe(smollm2_path: Path) -> None:
    for found in (run("chat"), run("chat", input="hello\n")):
        assert (found.returncode, found.stdout) == (2, "")
        assert "chat needs a terminal" in found.stderr
    assert run("chat", stdin=CLOSED).returncode == 2


def test_a_prompt_cache_carries_a_conversation_over(smollm2_path: Path, tmp_path: Path) -> None:
    command = ["chat", "-p", "What is the capital of Japan?", "-t", "0", "--stats", "--prompt-cache"]
    first, second = (run(*command, str(tmp_path / "cache")) for _ in range(2))
    assert first.stdout == second.stdout
    assert "36 reused, 1 computed" in second.stderr


def test_a_model_without_a_template_cannot_chat(tiny_llama) -> None:
    found = run("chat", "-m", str(tiny_llama()[0]), "-p", "x")
    assert found.returncode == 2
    assert "has no chat template" in found.stderr


READY = "\x1b[?2004h"  # what a terminal is told when a line can be typed


@pytest.fixture
def environment(smollm2_path: Path, tmp_path: Path) -> dict[str, str]:
    # Another home has no history of what was typed, but would have no kernels either, which take long to compile.
    return {"KVGEN_MODEL": str(smollm2_path), "HOME": str(tmp_path), "KVGEN_CACHE_DIR": str(cache_dir())}


def test_a_session_on_a_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    saved, other = tmp_path / "talk.json", tmp_path / "other.json"
    other.write_text("mine")
    code, shown = run_on_terminal(
        *("chat", "-t", "0", "-n", "40"),
        script=[
            (READY, "/stats\r"),
            ("stats are on", ""),
            (READY, "What is the capital of Japan?\r"),
            ("37 computed", ""),
            (READY, "And of France?\r"),
            ("reused", ""),
            (READY, "/undo\r"),
            ("taken back", ""),
            (READY, "/edit\r"),
            (READY, "\x15Say hi\r"),
            ("computed", ""),
            (READY, f"/save {saved}\r"),
            ("saved: 2 messages", ""),
            (READY, f"/save {saved}\r"),  # its own file
            ("saved: 2 messages", ""),
            (READY, f"/save {other}\r"),
            ("overwrite it?", "n\r"),
            ("not saved", ""),
            (READY, "/save ~no-such-user/talk.json\r"),
            ("is not a valid path", ""),
            (READY, f"/save {'x' * 300}\r"),
            ("is not a valid", ""),
            ("(OSError)", ""),
            (READY, "/nonsense\r"),
            ("no command /nonsense", ""),
            ("//nonsense", ""),
            (READY, "//bin is a folder. Say hi\r"),
            ("computed", ""),
            (READY, f"/save {saved}\r"),
            ("saved: 4 messages", ""),
            (READY, "/exit\r"),
        ],
        environment=environment,
    )
    assert code == 0
    assert "The capital of Japan is Tokyo." in shown
    assert "Traceback" not in shown
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["Say hi", "/bin is a folder. Say hi"]
    assert other.read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(environment: dict[str, str], tmp_path: Path) -> None:
    code, shown = run_on_terminal(
        *("chat", "-t", "0", "-n", "2000"),
        script=[(READY, "Tell me a very long story.\r"), ("story.", ""), (" the ", "\x03"), (READY, "\x04")],
        environment=environment,
    )
    assert code == 0
    assert "the text so far stays in the conversation" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_answers_end_where_the_model_ends_them(smollm2_path: Path) -> None:
    assert "[default: -1]" in " ".join(run("chat", "--help").stdout.split())
    found = run("chat", "-p", "Count.", "-t", "0", "--regex", "(1 ){300}")
    assert (found.stdout, found.stderr) == ("1 " * 300 + "\n", "")


@pytest.mark.slow
def test_what_was_dropped_or_cut_off_is_said(smollm2_path: Path) -> None:
    command = ["chat", "-p", "Tell me a long story.", "-t", "0"]
    assert "(cut off by --max-tokens: 1 token)" in run(*command, "-n", "1").stderr
    dropped = "the middle of the conversation was dropped"
    assert dropped not in run(*command, "-n", "4", "--max-context", "60").stderr
    assert dropped in run(*command, "-n", "40", "--max-context", "60").stderr
    assert dropped in run(*command, "-n", "1", "--max-context", "20").stderr


@pytest.mark.slow
def test_a_full_context_says_how_to_make_room(environment: dict[str, str]) -> None:
    _, shown = run_on_terminal(
        "chat", script=[(READY, "1" * 8300 + "\r"), ("included", ""), (READY, "/quit\r")], environment=environment
    )
    assert "/undo takes back the last question, /reset forgets" in " ".join(shown.split())


def screen(output: str, height: int) -> list[str]:
    """All lines that a terminal has shown, those that have scrolled off too. It knows what Rich sends."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", output):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif part.endswith("A") and part.startswith("\x1b"):
            row = max(row - int(part[2:-1]), len(lines) - height, 0)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return [line.rstrip() for line in lines]


def test_formatted_text_that_grows_leaves_each_line_once() -> None:
    items = [f"item number {n}" for n in range(1, 41)]
    text = "# Title\n\nOne paragraph.\n\n" + "".join(f"- {item}\n" for item in items) + "\n```\ncode\n```\n\nThe *end*."
    written = io.StringIO()
    with MarkdownWriter(Console(file=written, force_terminal=True, width=40, height=15)) as writer:
        for start in range(0, len(text), 5):
            writer.write(text[start : start + 5])
    lines = [line.strip(" \u2022") for line in screen(written.getvalue(), 15) if line]
    assert lines == ["Title", "One paragraph.", *items, "code", "The end."]


@pytest.mark.slow
def test_markdown_is_shown_formatted_and_links_are_not_hidden(environment: dict[str, str], tmp_path: Path) -> None:
    code, shown = run_on_terminal(
        *("chat", "--markdown", "-n", "12", "--regex", r"\*\*bold\*\* \[x\]\(http://y\.z\)"),
        script=[(READY, "go\r"), ("http://y.z", ""), (READY, "/quit\r")],
        environment=environment,
    )
    assert code == 0
    assert "\x1b[1mbold\x1b[0m" in shown
    assert "\x1b]8;" not in shown
