"""Templates and messages that nobody vouches for: what a template may cost, what a message may become."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import kvgen
from kvgen import CheckpointError, Message, UsageError
from kvgen.tokenizer.chat import ChatTemplate
from kvgen.tokenizer.limits import Budget
from kvgen.tokenizer.lookalikes import LookAlikes, encode_with

from .conftest import CORPUS

# --- Templates ---------------------------------------------------------------------------------------------------

GROWING = "{{% set n = namespace(v={}) %}}{{% for i in range(99) %}}{{% set n.v = {} %}}{{% endfor %}}"
HOSTILE = {
    # what doubles
    "text by +": (GROWING.format("'ab'", "n.v + n.v"), "too much text"),
    "text by ~": (GROWING.format("'ab'", "n.v ~ n.v"), "too much text"),
    "text by a format": (GROWING.format("'ab'", "'%s%s' % (n.v, n.v)"), "too (much|large)"),
    "text by a method": (GROWING.format("'ab'", "'{0}{0}'.format(n.v)"), "too much text"),
    "a block": ("{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}", "too much text"),
    "blocks in blocks": (
        "{% set x %}" + "ab" * 9999 + "{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
        "",
    ),
    "a macro": (
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'a' * 999 }}{% endmacro %}{{ f(60) }}",
        "too much text",
    ),
    "lists by +": (GROWING.format("[1]", "n.v + n.v"), "too (much|large)"),
    "lists of lists": (GROWING.format("[1]", "[n.v, n.v]"), "too large"),
    "tuples": (GROWING.format("[1]", "(n.v, n.v)"), "too large"),
    "dictionaries": (GROWING.format("[1]", "{1: n.v, 2: n.v}"), "too large"),
    "dictionaries by a call": (GROWING.format("[1]", "dict(a=n.v, b=n.v)"), "too large"),
    "many": (
        "{% set n = namespace(v=[]) %}{% for i in range(999) %}{% set n.v = n.v + ['a' * 999999] %}{% endfor %}",
        "",
    ),
    "text of its own": ("{% for i in range(99999) %}" + "a" * 999 + "{% endfor %}", "writes more than"),
    # single operations
    "bytes": ("{{ 'a'.encode() * 9999999999 }}", "too much text"),
    "to bytes": ("{{ (1).to_bytes(9999999999, 'big') }}", "too large"),
    "replace": ("{{ ('a' * 999999).replace('a', 'b' * 999999) }}", "too much text"),
    "replace nothing": ("{{ ('a' * 999999) | replace('', 'b' * 999999) }}", "too much text"),
    "join": ("{{ (['a' * 999999] * 99999) | join }}", "too large"),
    "separators": ("{{ range(99999) | join('a' * 999999) }}", "too much text"),
    "separators of a method": ("{{ ('a' * 999999).join(['x'] * 99999) }}", "too much text"),
    "separators of nothing": ("{{ ('a' * 999999).join([1] | map('string')) }}{{ 'a' * 99999999 }}", "too much text"),
    "translate": ("{{ ('a' * 9999).translate({97: 'b' * 999999}) }}", "translate"),
    "tabs": ("{{ ('\t' * 99999).expandtabs(999999) }}", "too much text"),
    "indentation": ("{{ ('a\n' * 99999) | indent(999999) }}", "too much text"),
    "indentation of JSON": ("{{ [[[[]]]] | tojson(indent=999999) }}", "layout"),
    "separators of JSON": ("{{ [1, 2] | tojson(separators=('a' * 999, 'b')) }}", "layout"),
    "a width from a value": ("{{ '%*d' % (9999999, 1) }}", "width"),
    "a nested width": ("{{ '{:{}}'.format(1, 9999999) }}", "width"),
    "many widths": ("{{ '%9999999d' * 99 % ((1,) * 99) }}", "too much text"),
    "a sum of lists": ("{{ ([[1] * 99] * 9999) | sum(start=[]) }}", "sum"),
    "trimming pair by pair": ("{{ ('a' * 999999).strip('b' * 99999 + 'a') }}", "strip"),
    "searching pair by pair": ("{{ ('a' * 999999).rfind('b' + 'a' * 99999) }}", "rfind"),
    "powers": ("{{ 9 ** (9 ** 9) }}", "number"),
    "products": (GROWING.format("9", "n.v * n.v"), "number"),
    "a large source": ("a" * 1_000_001, "longer than"),
    # the compiler
    "deep parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "deep lists": ("{{ " + "[" * 300 + "]" * 300 + " }}", ""),
    "deep loops": ("{% for a in [1] %}" * 50 + "{% endfor %}" * 50, "nested"),
    "deep conditions": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "indentation"),
    # what a namespace could reach
    "names of Python": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "no place"),
    "all that a namespace holds": (GROWING.format("1", "[n, n]") + "{{ [n] | tojson }}", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_take_all_memory_or_all_day_is_refused_at_once(name: str) -> None:
    source, reason = HOSTILE[name]
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"^the chat template fails .*{reason}") as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert time.perf_counter() - started < 4
    assert "MemoryError" not in str(caught.value)  # then it was tried
    assert "TemplateTimeoutError" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_format_is_estimated_before_it_is_made() -> None:
    with pytest.raises(SecurityError, match="too much text"):
        Budget().allows_format("%9999999d" * 99)


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
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match=r"longer than 0\.2 seconds"):
        ChatTemplate(loop, {}).render([])
    assert threading.active_count() == before


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
KINDS = ["byte-level", "prefixed", "always", "first", "never", "prepending", "lower case"]
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
@pytest.mark.parametrize("kind", KINDS)
def test_without_look_alikes_the_ids_are_the_librarys(kind: str, flags: str, normalized: bool) -> None:
    backend = vocabulary(kind, flags, normalized=normalized)
    look_alikes = LookAlikes(backend)

    @settings(deadline=None, max_examples=60, database=None)
    @given(text=TEXTS)
    @example(text="a <|s|> <|e|>b<|s|>c [X] d")
    def check(text: str) -> None:
        assert look_alikes.encode(text) == encode_with(backend, text, parse_special=True, policy=False).ids

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_alike_is_what_it_is_where_no_such_token_exists(kind: str) -> None:
    """The ground truth is the same vocabulary without the special token that the message looks like."""
    backend = vocabulary(kind, "plain", normalized=False)
    without = Tokenizer.from_str(backend.to_str().replace('"[X]"', '"\\u0001\\u0002"'))
    look_alikes = LookAlikes(backend)

    @settings(deadline=None, max_examples=60, database=None)
    @given(before=TEXTS, inside=TEXTS, after=TEXTS)
    def check(before: str, inside: str, after: str) -> None:
        before, inside, after = before.replace("[X]", ""), inside.replace("<|", ""), after.replace("[X]", "")
        text = f"{before}\n[X]{inside}[X] {after}"
        marked = f"{before}{look_alikes.marked(chr(10) + '[X]' + inside + '[X] ')}{after}"
        assert look_alikes.encode(marked) == encode_with(without, text, parse_special=True, policy=False).ids

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
    assert LookAlikes(backend).encode(text) == encode_with(backend, text, parse_special=True, policy=False).ids


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
