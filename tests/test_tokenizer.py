"""Tokenizers against transformers, and the streaming detokenizer against decoding everything at once."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

import kvgen
from kvgen import CheckpointError, UnsupportedError, UsageError
from kvgen.checkpoint import RawCheckpoint
from kvgen.tokenizer import Tokenizer, read_tokenizer
from kvgen.tokenizer.pretokenizers import PRE_TOKENIZERS
from kvgen.tokenizer.special_tokens import encode_text
from tests.conftest import CORPUS
from tests.gguf_files import as_metadata
from tests.sizes import examples


@pytest.mark.parametrize("text", CORPUS)
def test_gguf_vocabulary_encodes_and_decodes_like_transformers(smollm2, smollm2_reference_tokenizer, text: str) -> None:
    ids = smollm2.tokenizer.encode(text, parse_special=True)
    assert ids == smollm2_reference_tokenizer(text).input_ids
    assert smollm2.tokenizer.decode(ids) == smollm2_reference_tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=examples(200))
@given(text=st.text(min_size=1, max_size=60))
@example(text="  0 \x850 \u200312")  # white space before a digit is a piece of its own
def test_any_text_encodes_like_transformers(smollm2, smollm2_reference_tokenizer, text: str) -> None:
    assert smollm2.tokenizer.encode(text, parse_special=True) == smollm2_reference_tokenizer(text).input_ids


@settings(max_examples=examples(200))
@given(text=st.text(min_size=1, max_size=60))
def test_byte_level_text_survives_the_round_trip(tiny_tokenizer, text: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer, frozenset())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_thread_does_not_turn_the_switch_of_special_tokens_under_another_one() -> None:
    class Slow:
        """As the library's tokenizers, it looks at its switch while it encodes; and there is another thread by then."""

        encode_special_tokens = False

        def encode(self, text: str, *, add_special_tokens: bool) -> tuple[str, bool]:
            if text == "first":
                other.start()
                other.join(0.2)
            return text, self.encode_special_tokens

    backend: Any = Slow()
    found: list[Any] = []
    encode = partial(encode_text, backend, add_special_tokens=False)
    other = threading.Thread(target=lambda: found.append(encode("second", parse_special=False)))
    found.append(encode("first", parse_special=True))
    other.join()
    assert sorted(found) == [("first", False), ("second", True)]


def test_other_threads_run_while_a_long_text_is_encoded(smollm2) -> None:
    started, ended = threading.Event(), threading.Event()

    def encode() -> None:
        started.set()
        smollm2.tokenizer.encode("x" * 500_000)
        ended.set()

    threading.Thread(target=encode).start()
    started.wait()
    turns = 0
    while not ended.wait(0.01):
        turns += 1
    assert turns > 3


@pytest.mark.parametrize("parse_special", [False, True])
def test_long_texts_have_the_ids_of_short_ones(smollm2, parse_special: bool, monkeypatch) -> None:
    text = "Hello <|im_end|> w\xf6rld 123 \U0001f600\n\n" * 400
    long = smollm2.tokenizer.encode(text, parse_special=parse_special)
    monkeypatch.setattr("kvgen.tokenizer.special_tokens._LONG", len(text) + 1)
    assert long == smollm2.tokenizer.encode(text, parse_special=parse_special)


def test_text_that_looks_like_a_special_token_is_text_unless_asked(smollm2) -> None:
    tokenizer = smollm2.tokenizer
    end = 2  # <|im_end|>
    assert tokenizer.encode("a<|im_end|>b", parse_special=True)[1] == end
    assert end not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "a<|im_end|>b"


def test_the_default_model_ends_at_both_of_its_end_tokens(smollm2) -> None:
    assert smollm2.tokenizer.eos_ids == {0, 2}  # <|endoftext|> and <|im_end|>


def test_text_with_a_lone_surrogate_is_refused(smollm2) -> None:
    with pytest.raises(UsageError, match="character 1"):
        smollm2.tokenizer.encode("a\udc80")


# --- GGUF vocabularies made by hand ------------------------------------------------------------------------------


def gguf_raw(**changes: object) -> RawCheckpoint:
    keys: dict[str, object] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["<s>", "</s>", "a", "b", "ab", "<x>"],
        "token_type": [3, 3, 1, 1, 1, 4],
        "merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    keys |= changes
    return RawCheckpoint(Path("made.gguf"), "gguf", as_metadata(keys), {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [4]),
        ({"add_bos_token": True}, [0, 4]),
        ({"add_eos_token": True}, [4, 1]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, 4, 1]),
        ({"pre": "llama-bpe"}, [0, 4]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [4]),
    ],
)
def test_bos_and_eos_go_where_the_file_says(changes: dict[str, object], expected: list[int]) -> None:
    assert read_tokenizer(gguf_raw(**changes)).encode("ab") == expected


def pieces(name: str, text: str) -> list[str]:
    return [piece for piece, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)]


@pytest.mark.parametrize("text", CORPUS)
def test_pre_tokenizers_cut_like_those_of_transformers(text: str) -> None:
    """transformers has the Llama 3 pattern as the default of its tiktoken converter, and makes GPT-2's."""
    tiktoken_pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    llama3 = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(tiktoken_pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = {char: id_ for id_, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    gpt2 = GPT2Tokenizer(vocab=alphabet, merges=[]).backend_tokenizer.pre_tokenizer
    for name, expected in (("llama-bpe", llama3), ("gpt-2", gpt2)):
        assert pieces(name, text) == [piece for piece, _ in expected.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ["smollm", "starcoder"])
def test_digits_are_cut_one_by_one_where_the_vocabulary_wants_it(name: str) -> None:
    assert pieces(name, "in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


def test_a_piece_that_is_a_token_is_taken_whole_where_merges_would_not_make_it() -> None:
    tokens = {"tokens": ["<s>", "</s>", "a", "b", "ab"], "token_type": [3, 3, 1, 1, 1], "merges": []}
    assert read_tokenizer(gguf_raw(**tokens, pre="gpt-2")).encode("ab") == [2, 3]
    assert read_tokenizer(gguf_raw(**tokens, pre="llama-bpe", add_bos_token=False)).encode("ab") == [4]


def test_the_unknown_token_is_left_out_of_text() -> None:
    unknown = {"tokens": ["<unk>", "a", "b", "ab"], "token_type": [2, 1, 1, 1]}
    tokenizer = read_tokenizer(gguf_raw(**unknown, bos_token_id=None, eos_token_id=None))
    assert tokenizer.decode([1, 0, 2]) == "ab"


def test_user_defined_tokens_are_found_in_text_and_kept_in_it() -> None:
    tokenizer = read_tokenizer(gguf_raw())
    assert tokenizer.encode("a<x>b") == [2, 5, 3]
    assert tokenizer.decode([2, 5, 3, 1]) == "a<x>b"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "rwkv"}, UnsupportedError, "'rwkv'"),
        ({"model": None}, UnsupportedError, "None"),
        ({"pre": "no-such"}, UnsupportedError, "'no-such'"),
        ({"pre": None}, UnsupportedError, "pre is missing"),
        ({"tokens": None}, CheckpointError, "tokens is missing"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, CheckpointError, "same token twice"),
        ({"token_type": [1]}, CheckpointError, "token_type"),
        ({"merges": ["a b c"]}, CheckpointError, "two tokens"),
        ({"merges": ["a z"]}, CheckpointError, "does not fit"),
        ({"add_bos_token": True, "bos_token_id": 99}, CheckpointError, "99"),
        ({"add_bos_token": True, "bos_token_id": None}, CheckpointError, "add_bos_token is set, but bos_token_id is"),
    ],
)
def test_vocabularies_that_cannot_be_used_are_refused(changes, kind, message: str) -> None:
    with pytest.raises(kind, match=message):
        read_tokenizer(gguf_raw(**changes))


# --- Hugging Face folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}}, {5, 6}),
        ({"generation_config.json": {"eos_token_id": 7}}, {7}),
        ({"generation_config.json": {}}, {1}),  # config.json has 1
    ],
)
def test_end_tokens_of_a_folder(tiny_llama, files: dict[str, object], expected: set[int]) -> None:
    folder, _ = tiny_llama()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert kvgen.load(folder).tokenizer.eos_ids == expected


def test_a_damaged_tokenizer_is_one_clear_error(tiny_llama) -> None:
    folder, _ = tiny_llama()
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        kvgen.load(folder)


def test_a_folder_without_tokenizer_is_refused(tiny_llama) -> None:
    folder, _ = tiny_llama()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        kvgen.load(folder)


# --- The streaming detokenizer -----------------------------------------------------------------------------------


def sentencepiece_style() -> Tokenizer:
    """A vocabulary in the style of Llama 2: ▁ for spaces, bytes as <0xNN>, the first space dropped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "▁a", "a", "b", "▁▁", "é", "�", "▁the", "日"]
    backend = tokenizers.Tokenizer(
        models.BPE({token: id_ for id_, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    return Tokenizer(backend, frozenset({2}))


SENTENCEPIECE = sentencepiece_style()


def assert_stream_adds_up(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = tokenizer.detokenizer()
    pieces = [stream.add(id_) for id_ in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids)
    return pieces


@settings(max_examples=examples(500))
@given(st.lists(st.integers(0, 270), max_size=40))  # ids past the end of the vocabulary too
def test_sentencepiece_style_stream_adds_up(ids: list[int]) -> None:
    assert_stream_adds_up(SENTENCEPIECE, ids)


@settings(max_examples=examples(500))
@given(st.lists(st.integers(259, 268) | st.integers(0, 258), max_size=30))
def test_sentencepiece_style_stream_of_words_and_bytes_adds_up(ids: list[int]) -> None:
    assert_stream_adds_up(SENTENCEPIECE, ids)


@settings(max_examples=examples(300))
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_byte_level_stream_of_any_ids_adds_up(smollm2, ids: list[int]) -> None:
    assert_stream_adds_up(smollm2.tokenizer, ids)


@settings(max_examples=examples(300))
@given(data=st.data())
def test_byte_level_stream_of_broken_characters_adds_up(smollm2, data: st.DataObject) -> None:
    """Tokens that are pieces of characters, and special ones between them."""
    pieces = [id_ for id_ in range(17, 17 + 256) if "�" in smollm2.tokenizer.decode([id_])]
    ids = data.draw(st.lists(st.sampled_from([*pieces, 0, 2, 6403, 28]), max_size=25))
    assert_stream_adds_up(smollm2.tokenizer, ids)


@settings(max_examples=examples(200))
@given(text=st.text(max_size=40))
def test_stream_of_text_never_shows_half_a_character(tiny_tokenizer, text: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer, frozenset())
    pieces = assert_stream_adds_up(tokenizer, tokenizer.encode(text))
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


def test_stream_shows_each_word_at_once(smollm2) -> None:
    ids = smollm2.tokenizer.encode("Once upon a time")
    assert assert_stream_adds_up(smollm2.tokenizer, ids) == ["Once", " upon", " a", " time", ""]


def test_stream_shows_a_character_with_its_last_byte(smollm2) -> None:
    ids = smollm2.tokenizer.encode("😀!")
    assert len(ids) > 2
    pieces = assert_stream_adds_up(smollm2.tokenizer, ids)
    assert pieces[-3:] == ["😀", "!", ""]
