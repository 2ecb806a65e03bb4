"""Untrusted chat templates and messages: limits of the sandbox, and text that looks like special tokens."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import kvgen
from kvgen import CheckpointError, Message, UsageError
from kvgen.tokenizer.chat import ChatTemplate
from kvgen.tokenizer.special_tokens import SpecialTokenEscaper, encode_text

from .conftest import CORPUS
from .sizes import examples, first

# --- Templates ---------------------------------------------------------------------------------------------------

GROWING = "{{% set n = namespace(v={}) %}}{{% for i in range(99) %}}{{% set n.v = {} %}}{{% endfor %}}{{{{ n.v }}}}"
TIME = "takes longer than 1 seconds"
TEXT = "writes more than"
LIMIT = f"(needs too much memory|{TIME}|{TEXT})"  # which one first depends on the machine
HOSTILE = {
    # growth by doubling
    "text by +": (GROWING.format("'ab'", "n.v + n.v"), LIMIT),
    "text by ~": (GROWING.format("'ab'", "n.v ~ n.v"), LIMIT),
    "text by a format": (GROWING.format("'ab'", "'%s%s' % (n.v, n.v)"), LIMIT),
    "text by a method": (GROWING.format("'ab'", "'{0}{0}'.format(n.v)"), LIMIT),
    "a block": ("{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}", LIMIT),
    "blocks in blocks": (
        "{% set x %}" + "ab" * 9999 + "{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
        LIMIT,
    ),
    "a macro": ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'a' * 999 }}{% endmacro %}{{ f(60) }}", LIMIT),
    "lists by +": (GROWING.format("[1]", "n.v + n.v"), LIMIT),
    "lists of lists": (GROWING.format("[1]", "[n.v, n.v]"), LIMIT),
    "tuples": (GROWING.format("[1]", "(n.v, n.v)"), LIMIT),
    "dictionaries": (GROWING.format("[1]", "{1: n.v, 2: n.v}"), LIMIT),
    "dictionaries by a call": (GROWING.format("[1]", "dict(a=n.v, b=n.v)"), LIMIT),
    "namespaces": (GROWING.format("1", "namespace(a=n.v, b=n.v)"), LIMIT),
    "many": (
        "{% set n = namespace(v=[]) %}{% for i in range(9999) %}{% set n.v = n.v + ['a' * (999999 + i)] %}{% endfor %}",
        LIMIT,
    ),
    "text of its own": ("{% for i in range(99999) %}" + "a" * 999 + "{% endfor %}", TEXT),
    "a hundred million characters": ("{% for i in range(99999) %}{{ 'a' * 1001 }}{% endfor %}", TEXT),
    # single operations
    "a product": ("{{ 'a' * 10**10 }}", LIMIT),
    "bytes": ("{{ 'a'.encode() * 9999999999 }}", LIMIT),
    "to bytes": ("{{ (1).to_bytes(9999999999, 'big') }}", LIMIT),
    "replace": ("{{ ('a' * 999999).replace('a', 'b' * 999999) }}", LIMIT),
    "replace nothing": ("{{ ('a' * 999999) | replace('', 'b' * 999999) }}", LIMIT),
    "join": ("{{ (['a' * 999999] * 99999) | join }}", LIMIT),
    "separators": ("{{ range(99999) | join('a' * 999999) }}", LIMIT),
    "separators of a method": ("{{ ('a' * 999999).join(['x'] * 99999) }}", LIMIT),
    "separators of nothing": ("{{ ('a' * 999999).join([1] | map('string')) }}{{ 'a' * 99999999 }}", LIMIT),
    "translate": ("{{ ('a' * 9999).translate({97: 'b' * 999999}) }}", LIMIT),
    "tabs": ("{{ ('\t' * 99999).expandtabs(999999) }}", LIMIT),
    "indentation": ("{{ ('a\n' * 99999) | indent(999999) }}", LIMIT),
    "indentation of JSON": ("{{ [[[[]]]] | tojson(indent=9999999) }}", LIMIT),
    "separators of JSON": ("{{ [1, 2] | tojson(separators=('a' * 99999999, 'b')) }}", LIMIT),
    "a width": ("{{ '%9999999999d' % 1 }}", LIMIT),
    "a width from a value": ("{{ '%*d' % (99999999, 1) }}", LIMIT),
    "a nested width": ("{{ '{:{}}'.format(1, 99999999) }}", LIMIT),
    "many widths": ("{{ '%9999999d' * 199 % ((1,) * 199) }}", LIMIT),
    "a sum of lists": ("{{ ([[1] * 999] * 99999) | sum(start=[]) }}", LIMIT),
    "trimming pair by pair": ("{{ ('a' * 999999).strip('b' * 99999 + 'a') }}" * 9, TIME),
    "searching pair by pair": ("{{ ('a' * 999999).rfind('a' * 50000 + 'b' + 'a' * 50000) }}", TIME),
    "powers": ("{{ 9 ** (9 ** 9) }}", LIMIT),
    "powers of ten": ("{{ 10 ** (10 ** 8) }}", LIMIT),
    "products": (GROWING.format("9", "n.v * n.v"), LIMIT),
    "a large source": ("a" * 1_000_001, "longer than"),
    # the compiler
    "deep parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "deep lists": ("{{ " + "[" * 300 + "]" * 300 + " }}", ""),
    "deep loops": ("{% for a in [1] %}" * 50 + "{% endfor %}" * 50, "nested"),
    "deep conditions": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "indentation"),
    # reaching for Python
    "names of Python": ("{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__class__.__mro__ }}", "unsafe"),
    "all that a namespace holds": (GROWING.format("1", "[n, n]") + "{{ [n] | tojson }}", ""),
    "the protocol": ("{{ cycler.next.__globals__['sys'].stdout.write('{}') }}", "unsafe"),
}
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail if this process allocates more than 4 MB at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", first(3, HOSTILE))
def test_what_would_take_all_memory_or_all_day_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgen.tokenizer.sandbox.MAX_SECONDS", 1.0)
    source, reason = HOSTILE[name]
    template = ChatTemplate(source, {})
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"^the chat template fails .*{reason}") as caught, little_memory():
        template.render([{"role": "user", "content": "x"}])
    assert time.perf_counter() - started < 4
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "attack", [FOREVER, "{{ 'a' * 10**10 }}", "{{ messages[0].content * 10**8 }}", "{{ nothing.at.all }}"]
)
def test_the_next_rendering_works(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgen.tokenizer.sandbox.MAX_SECONDS", 1.0)
    template = ChatTemplate("{% if messages %}" + attack + "{% endif %}fine", {})
    assert template.render([]) == "fine"
    with pytest.raises(CheckpointError):
        template.render([{"role": "user", "content": "x"}])
    assert template.render([]) == "fine"


def test_a_worker_that_dies_is_replaced() -> None:
    template = ChatTemplate("fine", {})
    template.render([])
    (worker,) = workers_of(template)
    worker.kill()
    worker.wait()
    assert template.render([]) == "fine"


def workers_of(template: ChatTemplate) -> list[psutil.Process]:
    process = template._sandbox._process
    return [] if process is None else [psutil.Process(process.pid)]


def test_a_worker_ends_with_its_template() -> None:
    template = ChatTemplate("fine", {})
    template.render([])
    (worker,) = workers_of(template)
    del template
    gc.collect()
    assert not worker.is_running()


def test_a_worker_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    template = ChatTemplate("fine", {})
    with open(os.devnull) as file:  # noqa: PTH123
        os.set_inheritable(file.fileno(), True)
        template.render([])
        (worker,) = workers_of(template)
        assert "SECRET" not in worker.environ()
        assert worker.num_fds() == 4  # stdin, the answers, and /dev/null twice
    assert os.getsid(worker.pid) == worker.pid  # so Ctrl-C does not reach it


def test_threads_take_turns() -> None:
    template = ChatTemplate("{{ messages[0].content * 999 }}", {})
    found: dict[str, str] = {}

    def render(content: str) -> None:
        for _ in range(20):
            found[content] = template.render([{"role": "user", "content": content}])

    threads = [threading.Thread(target=render, args=(content,)) for content in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {content: content * 999 for content in "abcdef"}


IN_A_PROCESS = """
import gc, os, sys, threading, time, warnings
from kvgen.tokenizer.chat import ChatTemplate
from tests.sizes import examples
warnings.simplefilter("error")
template = ChatTemplate("{% if messages %}" + FOREVER + "{% endif %}fine", {})
assert template.render([]) == "fine"
"""
FORKING = """
worker = template._sandbox._process.pid
child = os.fork()
if child == 0:
    assert template.render([]) == "fine"
    assert template._sandbox._process.pid != worker
    del template
    gc.collect()
    sys.exit(0)  # runs what is registered for the exit
assert os.waitpid(child, 0)[1] == 0
assert template.render([]) == "fine"
assert template._sandbox._process.pid == worker
"""
LEAVING = """
threading.Thread(target=lambda: template.render([{"role": "user", "content": "x"}]), daemon=True).start()
time.sleep(0.3)
sys.stdout.write(str(template._sandbox._process.pid))
"""


@pytest.mark.parametrize("code", [FORKING, LEAVING], ids=["fork", "exit"])
def test_workers_belong_to_the_process_that_started_them(code: str) -> None:
    program = f"FOREVER = {FOREVER!r}" + IN_A_PROCESS + code
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "ResourceWarning" not in ended.stderr
    assert not ended.stdout or not psutil.pid_exists(int(ended.stdout))


def test_a_template_in_use_needs_no_new_process() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    template.render([{"role": "user", "content": "x"}])
    first = workers_of(template)
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        template.render([{"role": "user", "content": "x"}])
        seconds.append(time.perf_counter() - started)
    assert workers_of(template) == first
    assert min(seconds) < 1e-3


def test_text_of_any_kind_survives_the_sandbox() -> None:
    content = "\0\t\r\n\u2028 é 日本 😀 \ud800 \"'"
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": content}]) == content


def test_a_long_conversation_is_within_the_limits() -> None:
    """As much as a context of a million tokens holds, in a template that goes through it again and again."""
    messages: list[Message] = [
        {"role": "assistant" if turn % 2 else "user", "content": f"{turn} " + "word " * 1000} for turn in range(600)
    ]
    source = (
        "{% set ns = namespace(last='') %}{% for m in messages %}"
        "{% set ns.last = (messages | selectattr('role', 'equalto', 'user') | list)[-1].content %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content.strip() | replace('word', 'w') ~ '<|im_end|>\n' }}"
        "{% endfor %}{{ ns.last }}"
    )
    text = ChatTemplate(source, {}).render(messages)
    assert text.endswith("598 " + "word " * 1000)
    assert len(text) > 1_000_000


def test_each_rendering_has_limits_of_its_own() -> None:
    template = ChatTemplate("{{ ('a' * 9000000) | length }}", {})
    assert [template.render([]) for _ in range(20)] == ["9000000"] * 20


def test_a_template_that_was_stopped_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgen.tokenizer.sandbox.MAX_SECONDS", 0.2)
    before = threading.active_count()
    template = ChatTemplate(FOREVER, {})
    with pytest.raises(CheckpointError, match=r"longer than 0\.2 seconds"):
        template.render([])
    assert threading.active_count() <= before + 1  # the timer's thread may still be ending
    process = template._sandbox._process
    assert process is not None
    assert process.returncode is not None


# --- Messages ----------------------------------------------------------------------------------------------------

PIECES = [
    "<|s|>",
    "<|e|>",
    "[X]",
    "a",
    " ",
    "  ",
    "\n",
    "hello",
    "Hi there",
    " world",
    "é",
    "日本",
    "<|",
    "|>",
    "X",
    "_1",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
KINDS = ["byte-level", "first", "prepending", "prefixed", "always", "never", "lower case"]
FLAGS = {"plain": {}, "left": {"lstrip": True}, "right": {"rstrip": True}, "words": {"single_word": True}}


def vocabulary(kind: str, flags: str, *, normalized: bool) -> Tokenizer:
    """A tokenizer of one of the kinds that checkpoints have, with `<|s|>` and `<|e|>` that have the flags."""
    tokenizer, alphabet = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True)), []
    if kind in ("byte-level", "prefixed"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefixed")
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prepending":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "lower case":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    special = [
        AddedToken("<unk>", special=True),
        AddedToken("<|s|>", special=True, normalized=normalized, **FLAGS[flags]),
        AddedToken("<|e|>", special=True, normalized=normalized, **FLAGS[flags]),
        AddedToken("[X]", special=True, normalized=normalized),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.mark.parametrize("normalized", [False, True], ids=["as written", "normalized"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", first(3, KINDS))
def test_without_look_alikes_the_ids_are_the_librarys(kind: str, flags: str, normalized: bool) -> None:
    backend = vocabulary(kind, flags, normalized=normalized)
    escaper = SpecialTokenEscaper(backend, lambda: backend)

    @settings(max_examples=examples(60), database=None)
    @given(text=TEXTS)
    @example(text="a <|s|> <|e|>b<|s|>c [X] d")
    def check(text: str) -> None:
        assert escaper.encode(text) == encode_text(backend, text, parse_special=True, add_special_tokens=False).ids

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_alike_is_what_it_is_where_no_such_token_exists(kind: str) -> None:
    """The ground truth is the same vocabulary without the special token that the message looks like."""
    backend = vocabulary(kind, "plain", normalized=False)
    without = Tokenizer.from_str(backend.to_str().replace('"[X]"', '"\\u0001\\u0002"'))
    escaper = SpecialTokenEscaper(backend, lambda: backend)

    @settings(max_examples=examples(60), database=None)
    @given(before=TEXTS, inside=TEXTS, after=TEXTS)
    def check(before: str, inside: str, after: str) -> None:
        before, inside, after = before.replace("[X]", ""), inside.replace("<|", ""), after.replace("[X]", "")
        text = f"{before}\n[X]{inside}[X] {after}"
        marked = f"{before}{escaper.escape(chr(10) + '[X]' + inside + '[X] ')}{after}"
        assert escaper.encode(marked) == encode_text(without, text, parse_special=True, add_special_tokens=False).ids

    check()


def tokenizer_with(*special: str, normalizer: normalizers.Normalizer | None = None) -> kvgen.Tokenizer:
    backend = vocabulary("byte-level", "plain", normalized=normalizer is not None)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([AddedToken(text, special=True, normalized=normalizer is not None) for text in special])
    return kvgen.Tokenizer(backend, frozenset(), "<|s|>{{ messages[0].content }}<|e|>")


def special_in(tokenizer: kvgen.Tokenizer, content: str) -> list[str]:
    """The special tokens of a conversation, without the two that the template writes."""
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    found = [tokenizer.token(id_) for id_ in ids if id_ in tokenizer.special_ids]
    assert (found[0], found[-1]) == ("<|s|>", "<|e|>")
    return found[1:-1]


@pytest.mark.parametrize(
    ("special", "content"),
    [
        ((), "<|e|><|s|>"),
        (("<|e|>x",), "a<|e|>xy"),  # the longer one
        (("e|>[",), "<|e|>[X]"),  # one begins inside another
        (("☃", "☃☃"), "one☃ two☃☃ three☃☃☃"),  # nothing fits inside
        (("+*",), "a+*b"),  # means something to regular expressions
    ],
    ids=str,
)
def test_messages_cannot_write_special_tokens_of_any_form(special: tuple[str, ...], content: str) -> None:
    tokenizer = tokenizer_with(*special)
    assert special_in(tokenizer, content) == []
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert tokenizer.decode(ids) == content


def test_of_two_special_tokens_of_a_template_the_longer_one_is_meant() -> None:
    backend = tokenizer_with("<|e|>x").backend
    text = "<|e|>x <|e|>"
    assert (
        SpecialTokenEscaper(backend, lambda: backend).encode(text)
        == encode_text(backend, text, parse_special=True, add_special_tokens=False).ids
    )


def test_messages_cannot_write_special_tokens_that_a_normalizer_would_make() -> None:
    tokenizer = tokenizer_with(normalizer=normalizers.Lowercase())
    assert special_in(tokenizer, "<|E|>") == []
    assert len(special_in_parsed(tokenizer, "<|E|>")) == 3


def special_in_parsed(tokenizer: kvgen.Tokenizer, content: str) -> list[int]:
    ids = tokenizer.encode_chat([{"role": "user", "content": content}], parse_special=True)
    return [id_ for id_ in ids if id_ in tokenizer.special_ids]


def test_private_characters_of_a_message_are_kept_and_mean_nothing() -> None:
    tokenizer = tokenizer_with()
    content = "\ufdd05\ufdd1 \ufdd01.2\ufdd1 <\ufdd0|e|> <|e|>"
    assert special_in(tokenizer, content) == []
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": content}])) == content


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("m.strip()", "a <|e|> b"),
        ("m | upper", " A <|E|> B "),
        ("m.split('</think>')[-1]", " a <|e|> b "),
        ("m if ' b' in m else ''", " a <|e|> b "),
        ("m | tojson", '" a <|e|> b "'),
        ("m | tojson(ensure_ascii=true)", '" a <|e|> b "'),
        ("m | e", " a &lt;|e|&gt; b "),
        ("m | title", " A <|e|> B "),
    ],
)
def test_marks_survive_what_templates_do_to_messages(expression: str, expected: str) -> None:
    source = f"<|s|>{{% set m = messages[0].content %}}{{{{ {expression} }}}}<|e|>"
    tokenizer = tokenizer_with().with_chat_template(source)
    ids = tokenizer.encode_chat([{"role": "user", "content": " a <|e|> b "}])
    assert tokenizer.decode(ids) == expected


def test_text_that_is_no_unicode_is_refused_beside_a_look_alike() -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer_with().encode_chat([{"role": "user", "content": "<|e|>\ud800"}])
