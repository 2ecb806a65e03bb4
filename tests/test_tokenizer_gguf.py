"""Vocabularies in GGUF files against the libraries that they come from: sentencepiece, tokenizers, transformers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import sentencepiece
import tokenizers
import transformers
from gguf import GGUFWriter
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers.normalizers import NFC
from transformers.convert_slow_tokenizer import generate_merges

import kvgen.tokenizer.sentencepiece
import kvgen.tokenizer.vocabulary
from kvgen import CheckpointError, Tokenizer, UnsupportedError
from kvgen.checkpoint import RawCheckpoint
from kvgen.checkpoint.gguf import read as read_gguf
from kvgen.checkpoint.strings import Strings
from kvgen.tokenizer import read_tokenizer
from kvgen.tokenizer.pretokenizers import PRE_TOKENIZERS
from kvgen.tokenizer.sentencepiece import merges_by_score
from kvgen.tokenizer.vocabulary import TokenIds
from tests.conftest import CORPUS
from tests.gguf_files import as_metadata
from tests.sizes import examples

any_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00\u2581"), max_size=60)
# Few characters make long runs, and so overlapping pairs of equal rank.
repetitive_text = st.sampled_from(["ab", "a ", " \n", "=-", "aá", "01 "]).flatmap(
    lambda alphabet: st.text(alphabet, max_size=80)
)
TEXTS = [
    *CORPUS,
    "",
    "  ",
    "a  b   c",
    " leading",
    "trailing ",
    "\n\n\n",
    "x\u00ad\u200b\ufeffy",
    "ﬁ Å Å ①",
    "1234567 89",
]


def read(keys: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    metadata = as_metadata(keys)
    metadata["general.architecture"] = architecture
    return read_tokenizer(RawCheckpoint(Path("made.gguf"), "gguf", metadata, {}))


# --- SentencePiece-style -----------------------------------------------------------------------------------------


def train(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in CORPUS * 3 if text.strip()]),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def as_keys(name: str, **changes: Any) -> dict[str, Any]:
    """A processor's pieces as llama.cpp's converter writes them."""
    processor = PROCESSORS[name]
    user_defined = USER_DEFINED if name == "with user-defined symbols" else []

    def type_of(id_: int) -> int:
        if processor.IsUnknown(id_):
            return 2
        if processor.IsControl(id_):
            return 3
        if processor.IsByte(id_):
            return 6
        return 4 if processor.IdToPiece(id_) in user_defined else 1

    ids = range(processor.GetPieceSize())
    return {
        "model": "llama",
        "tokens": [processor.IdToPiece(id_) for id_ in ids],
        "scores": [processor.GetScore(id_) for id_ in ids],
        "token_type": [type_of(id_) for id_ in ids],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        **changes,
    }


USER_DEFINED = ["<user>", "\u2581\u2581\u2581", "\n\n", "code:"]
PROCESSORS = {
    "plain": train(),
    "without a prefix space": train(add_dummy_prefix=False),
    "with user-defined symbols": train(add_dummy_prefix=False, user_defined_symbols=USER_DEFINED),
    "with digits apart": train(split_digits=True),
    "words across spaces": train(split_by_whitespace=False),
}


def sentencepiece_tokenizer(name: str, **changes: Any) -> Tokenizer:
    prefix = {"add_space_prefix": False} if "without" in name or "user" in name else {}
    return read(as_keys(name, **prefix, add_bos_token=False) | changes)


BUILT = {name: sentencepiece_tokenizer(name) for name in PROCESSORS}
every_processor = pytest.mark.parametrize("name", PROCESSORS)


@every_processor
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_equal_sentencepieces(name: str, text: str) -> None:
    text = text.replace("\x00", "")  # which the library cannot hold
    ids = BUILT[name].encode(text)
    assert ids == PROCESSORS[name].Encode(text)
    assert BUILT[name].decode(ids) == PROCESSORS[name].Decode(ids)


@every_processor
@settings(max_examples=examples(150))
@given(text=any_text | repetitive_text)
def test_ids_of_any_text_equal_sentencepieces(name: str, text: str) -> None:
    assert BUILT[name].encode(text) == PROCESSORS[name].Encode(text)


@every_processor
@settings(max_examples=examples(100))
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(name: str, data: st.DataObject) -> None:
    tokenizer = BUILT[name]
    ids = data.draw(st.lists(st.integers(0, PROCESSORS[name].GetPieceSize() - 1), max_size=30))
    stream = tokenizer.detokenizer()
    assert "".join([*(stream.add(id_) for id_ in ids), stream.flush()]) == tokenizer.decode(ids)


@every_processor
@settings(max_examples=examples(100))
@given(text=any_text)
def test_a_stream_of_text_never_shows_half_a_character(name: str, text: str) -> None:
    tokenizer = BUILT[name]
    ids = tokenizer.encode(text)
    stream = tokenizer.detokenizer()
    pieces = [*(stream.add(id_) for id_ in ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids) == PROCESSORS[name].Decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def transformers_class(name: str, processor: sentencepiece.SentencePieceProcessor) -> Any:
    """A transformers class that has the same pieces, and the merges of transformers' own conversion."""
    keys = as_keys(name)
    vocab = {token: id_ for id_, token in enumerate(keys["tokens"])}
    normal = zip(keys["tokens"], keys["scores"], keys["token_type"], strict=True)
    merges = generate_merges(
        {token: vocab[token] for token in vocab if keys["token_type"][vocab[token]] == 1},
        {token: score for token, score, type_ in normal if type_ == 1},
    )
    if name == "without a prefix space":
        return transformers.GemmaTokenizer(vocab=vocab, merges=merges, bos_token="<s>", eos_token="</s>")
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges)


SENTENCEPIECE_CLASSES = {
    name: transformers_class(name, PROCESSORS[name]) for name in ("plain", "without a prefix space")
}


@pytest.mark.parametrize("name", SENTENCEPIECE_CLASSES)
@settings(max_examples=examples(150))
@given(text=any_text | repetitive_text | st.sampled_from(TEXTS))
def test_ids_equal_those_of_transformers_sentencepiece_classes(name: str, text: str) -> None:
    assume(name != "plain" or not text.startswith(" "))  # where its LlamaTokenizer adds no space, unlike sentencepiece
    theirs = SENTENCEPIECE_CLASSES[name].encode(text, add_special_tokens=False, split_special_tokens=True)
    assert BUILT[name].encode(text) == theirs


@pytest.mark.parametrize("spaces", ["as texts have them", "with their sign"])
@settings(max_examples=examples(150))
@given(texts=st.lists(any_text | repetitive_text | st.sampled_from(["<user>", "   ", "\n\n", "code:"]), max_size=5))
def test_user_defined_tokens_with_spaces_are_found(spaces: str, texts: list[str]) -> None:
    """llama.cpp's converter writes their spaces as such; sentencepiece itself as ▁."""
    text = "".join(texts)
    expected = PROCESSORS["with user-defined symbols"].Encode(text)
    assert USER_DEFINED_BUILT[spaces].encode(text) == expected
    assert USER_DEFINED_BUILT[spaces].decode(expected) == PROCESSORS["with user-defined symbols"].Decode(expected)


def with_plain_spaces(keys: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(keys["tokens"], keys["token_type"], strict=True)
    return keys | {"tokens": [token.replace("\u2581", " ") if type_ == 4 else token for token, type_ in pairs]}


USER_DEFINED_BUILT = {
    "as texts have them": read(
        with_plain_spaces(as_keys("with user-defined symbols", add_space_prefix=False, add_bos_token=False))
    ),
    "with their sign": BUILT["with user-defined symbols"],
}


def test_a_space_comes_before_the_text_and_after_each_found_token() -> None:
    """As in llama.cpp, whose ids these are."""
    tokenizer, processor = (
        read(as_keys("with user-defined symbols", add_bos_token=False)),
        PROCESSORS["with user-defined symbols"],
    )
    ids = tokenizer.encode("a<user>b   c\n\nd")
    user, spaces, lines = (processor.PieceToId(token) for token in USER_DEFINED[:3])
    parts = [processor.Encode(f" {letter}") for letter in "abcd"]
    assert ids == [*parts[0], user, *parts[1], spaces, *parts[2], lines, *parts[3]]
    assert tokenizer.decode(ids) == "a<user> b    c\n\n d"


def test_special_tokens_take_white_space_where_the_models_own_do() -> None:
    """Phi-3's tokenizer.json has rstrip on all special tokens but three."""
    keys = as_keys("plain", add_bos_token=False)
    keys["tokens"][-1], keys["token_type"][-1] = "<|user|>", 3
    user, hi = len(keys["tokens"]) - 1, PROCESSORS["plain"].Encode("hi")
    text = "<|user|>\n hi<s> hi"
    there = read(keys, architecture="phi3")
    assert there.encode(text, parse_special=True) == [user, *hi, 1, *PROCESSORS["plain"].Encode(" hi")]
    elsewhere = read(keys).encode(text, parse_special=True)
    assert elsewhere == [user, *PROCESSORS["plain"].Encode("\n hi"), 1, *PROCESSORS["plain"].Encode(" hi")]


@pytest.mark.parametrize("type_", [1, 3, 4])
def test_names_of_ends_are_control_tokens_whatever_the_file_calls_them(type_: int) -> None:
    keys = as_keys("plain", add_bos_token=False)
    keys["tokens"][-1], keys["token_type"][-1] = "<end_of_turn>", type_
    end = len(keys["tokens"]) - 1
    tokenizer = read(keys)
    assert tokenizer.eos_ids == {2, end}
    assert end not in tokenizer.encode("a<end_of_turn>")
    assert tokenizer.encode("a<end_of_turn>", parse_special=True)[-1] == end


def test_a_struck_out_text_of_html_does_not_end_a_completion() -> None:
    keys = byte_level(GPT2_CUT) | {"pre": "gpt-2", "merges": []}
    keys["tokens"][-1] = "</s>"  # of a type that merging makes
    assert read(keys).eos_ids == {0}  # <|endoftext|> alone


@every_processor
@pytest.mark.parametrize("parse_special", [False, True])
@settings(max_examples=examples(150))
@given(
    texts=st.lists(any_text | repetitive_text | st.sampled_from(["<user>", "<s>", " ", "\u2581", "\n\n"]), max_size=5)
)
def test_the_merges_of_a_text_lead_to_the_same_ids_as_all(name: str, parse_special: bool, texts: list[str]) -> None:
    ids = []
    for few in (1000, 0):
        with patch.object(kvgen.tokenizer.sentencepiece, "_FEW", few):
            tokenizer = read(as_keys(name))
            ids.append(tokenizer.encode("".join(texts), parse_special=parse_special))
    assert ids[0] == ids[1]


def test_all_merges_are_found_when_texts_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def count(tokens: list[str], *args: Any) -> Any:
        sizes.append(len(tokens))
        return merges_by_score(tokens, *args)

    monkeypatch.setattr(kvgen.tokenizer.sentencepiece, "merges_by_score", count)
    monkeypatch.setattr(kvgen.tokenizer.sentencepiece, "_FEW", 50)
    keys = as_keys("plain")
    tokenizer = read(keys)
    for text in ("The quick", "brown", "x" * 50, "fox", "jumps"):
        tokenizer.encode(text)
    few, fewer, *every = sizes
    assert max(few, fewer) < 300 and every == [len(keys["tokens"])]


@pytest.mark.parametrize("type_", [3, 5])
def test_merging_leads_to_pieces_alone(type_: int) -> None:
    text = "The quick"
    id_ = next(id_ for id_ in BUILT["plain"].encode(text) if len(PROCESSORS["plain"].IdToPiece(id_)) > 1)
    keys = as_keys("plain", add_bos_token=False)
    keys["token_type"][id_] = type_  # a control token, or one that is not in use
    ids = read(keys).encode(text)
    assert id_ not in ids and read(keys).decode(ids) == text


@given(
    tokens=st.lists(st.text("ab\u2581é\U0001f600", max_size=6), unique=True, max_size=60),
    random=st.randoms(use_true_random=False),
)
def test_merges_are_all_cuts_of_a_piece_into_two(tokens: list[str], random: Any) -> None:
    """Best score first, then by the ids of both halves; by trying each cut of each piece."""
    scores = [random.choice([-1, -2.5, 0, float("-inf"), 3]) for _ in tokens]
    is_piece = [random.random() < 0.9 for _ in tokens]
    pieces = {token: id_ for id_, token in enumerate(tokens) if is_piece[id_]}
    expected = []
    for token in sorted(pieces, key=lambda token: -scores[pieces[token]]):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pieces.keys() >= set(pair)]
        expected += sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    assert merges_by_score(tokens, scores, is_piece) == expected


@given(tokens=st.lists(any_text, max_size=60), others=st.lists(any_text, max_size=60), alike=st.booleans())
def test_ids_are_those_of_a_dictionary(tokens: list[str], others: list[str], alike: bool) -> None:
    """alike: all tokens have the same hash."""
    strings = Strings.of(tokens)
    assert list(strings) == tokens == [strings[id_] for id_ in range(len(strings))]
    assert strings.longest == max(map(len, tokens), default=0)
    with patch.object(kvgen.tokenizer.vocabulary, "hash", (lambda _: 7) if alike else hash, create=True):
        ids = TokenIds(strings)
        assert len(ids) == len(set(tokens))
        known = {token: id_ for id_, token in enumerate(tokens)}
        assume(len(known) == len(tokens))  # others are refused
        assert ids.of([*others, *tokens]) == known
        assert [ids.get(text) for text in others] == [known.get(text) for text in others]


@every_processor
@settings(max_examples=examples(50))
@given(data=st.data())
def test_ids_decode_as_in_the_tokenizers_library(name: str, data: st.DataObject) -> None:
    tokenizer = read(as_keys(name))
    ids = data.draw(st.lists(st.integers(0, len(as_keys(name)["tokens"]) + 1), max_size=40))  # the last are unknown
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)
    assert list(map(tokenizer.token, ids)) == [tokenizer.backend.decode([i], skip_special_tokens=False) for i in ids]
    assert tokenizer.shares_vocabulary(Tokenizer(tokenizer.backend, tokenizer.eos_ids))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_vocabulary_takes_little_memory(tmp_path: Path) -> None:
    count = 50_000
    writer = GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{byte:02X}>" for byte in range(256)] + [f"token {i}" for i in range(count)])
    writer.add_token_scores([0.0] * (256 + count))
    writer.add_token_types([6] * 256 + [1] * count)
    writer.add_bos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    script = f"""
import psutil, kvgen.tokenizer.gguf
from pathlib import Path
from kvgen.checkpoint import read_checkpoint
from kvgen.system import return_freed_memory
from kvgen.tokenizer import read_tokenizer
before = psutil.Process().memory_full_info().uss
tokenizer = read_tokenizer(read_checkpoint(Path({str(tmp_path / "large.gguf")!r})))
return_freed_memory()
print(psutil.Process().memory_full_info().uss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160 * count


def test_scores_may_be_whole_numbers() -> None:
    keys = as_keys("plain", add_bos_token=False)
    tokenizer = read(keys | {"scores": [round(score) for score in keys["scores"]]})
    assert tokenizer.encode(CORPUS[1]) == PROCESSORS["plain"].Encode(CORPUS[1])


def test_transformers_reads_the_same_ids_from_the_same_file(tmp_path: Path) -> None:
    keys = as_keys("plain")
    writer = GGUFWriter(tmp_path / "made.gguf", "phi3")  # of which it knows that every text begins with a space
    writer.add_tokenizer_model("llama")
    writer.add_token_list(keys["tokens"])
    writer.add_token_scores(keys["scores"])
    writer.add_token_types(keys["token_type"])
    writer.add_bos_token_id(keys["bos_token_id"])
    writer.add_eos_token_id(keys["eos_token_id"])
    writer.add_unk_token_id(keys["unknown_token_id"])
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = read_tokenizer(read_gguf(tmp_path / "made.gguf"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="made.gguf")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids


def test_bos_comes_first_unless_the_file_says_otherwise() -> None:
    keys = as_keys("plain")
    plain = BUILT["plain"].encode("Hello")
    assert read(keys).encode("Hello") == [1, *plain]
    assert read(keys | {"add_eos_token": True}).encode("Hello") == [1, *plain, 2]
    assert read(keys).eos_ids == {2}


def test_control_tokens_are_text_unless_asked_for() -> None:
    tokenizer, processor = BUILT["plain"], PROCESSORS["plain"]
    assert tokenizer.encode("a</s>b") == processor.Encode("a</s>b")
    assert 2 not in tokenizer.encode("a</s>b")
    assert tokenizer.encode("a</s>b", parse_special=True) == [*processor.Encode("a"), 2, *processor.Encode("b")]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "t5"}, UnsupportedError, "'t5'"),
        ({"token_type": [[1]] * 700}, CheckpointError, "token_type must be integers"),
        ({"scores": None}, CheckpointError, "scores must have one entry per token"),
        ({"scores": [0.0]}, CheckpointError, "scores must have one entry per token"),
        ({"scores": ["high"] * 700}, CheckpointError, "scores must be numbers"),
        ({"scores": [float("nan")] * 700}, CheckpointError, "scores must be numbers"),
        ({"token_type": [1]}, CheckpointError, "token_type"),
        ({"eos_token_id": 10**6}, CheckpointError, "eos_token_id is 1000000"),
        ({"eot_token_id": 10**6}, CheckpointError, "eot_token_id is 1000000"),
        ({"bos_token_id": -1}, CheckpointError, "bos_token_id is -1"),
        ({"bos_token_id": 10**6, "add_bos_token": False}, CheckpointError, "bos_token_id is 1000000"),
        ({"bos_token_id": None}, CheckpointError, "bos_token_id is missing"),
        ({"bos_token_id": True}, CheckpointError, "bos_token_id is True"),
        ({"add_bos_token": "no"}, CheckpointError, "add_bos_token is 'no'"),
        ({"add_space_prefix": 0}, CheckpointError, "add_space_prefix is 0"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, CheckpointError, "twice"),
        ({"tokens": ["\u2581", " "], "token_type": [4, 1]}, CheckpointError, "twice"),
        ({"tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0, 0.0]}, CheckpointError, "neither an unknown"),
    ],
    ids=str,
)
def test_vocabularies_that_do_not_hold_together_are_refused(changes: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        read(as_keys("plain") | changes)


# --- Byte-level BPE ----------------------------------------------------------------------------------------------


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, size: int = 900) -> dict[str, Any]:
    """A vocabulary that was trained on texts cut so, as GGUF keys."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    special = [AddedToken("<|endoftext|>", special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, "don't we'll I'M HelloWorld camelCase 1234567"] * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [3] + [1] * (len(tokens) - 1),
        "merges": [" ".join(merge) for merge in model["merges"]],
    }


GPT2_CUT = pre_tokenizers.ByteLevel(add_prefix_space=False)
# transformers' own classes build the tokenizer of a family from a vocabulary and merges alone.
CLASSES = {
    "gpt-2": transformers.GPT2Tokenizer,
    "phi-2": transformers.CodeGenTokenizer,
    "qwen2": transformers.Qwen2Tokenizer,
    "qwen35": transformers.Qwen3_5Tokenizer,
    "olmo": transformers.GPTNeoXTokenizer,
    "mpt": transformers.GPTNeoXTokenizer,
}


@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_ids_equal_those_of_transformers_classes(name: str, text: str) -> None:
    ours, theirs = both(name)
    for candidate in (text, *TEXTS):
        assert ours.encode(candidate) == theirs.encode(candidate, add_special_tokens=False, split_special_tokens=True)


_MADE: dict[str, tuple[Tokenizer, Any]] = {}


def both(name: str) -> tuple[Tokenizer, Any]:
    if name not in _MADE:
        keys = byte_level(GPT2_CUT)
        vocab = {token: id_ for id_, token in enumerate(keys["tokens"])}
        merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
        _MADE[name] = read(keys | {"pre": name}), CLASSES[name](vocab=vocab, merges=merges)
    return _MADE[name]


# tokenizer.json files that cannot be had here: the patterns as they are published, each with the models that have it.
PUBLISHED = {
    # Llama 3, and without its rule for whole words SmolLM3; DBRX and OLMo 2 have GPT-4's, which is the same
    ("llama-bpe", "smaug-bpe", "dbrx"): (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    ("stablelm2",): (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    # Mistral Nemo
    ("tekken",): (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Phi-4 mini
    ("gpt-4o",): (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@pytest.mark.parametrize(("name", "pattern"), [(n, p) for names, p in PUBLISHED.items() for n in names])
def test_texts_are_cut_by_the_published_pattern(name: str, pattern: str) -> None:
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    keys = byte_level(cut)
    ours = read(keys | {"pre": name, "add_bos_token": False})
    vocab = {token: id_ for id_, token in enumerate(keys["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    theirs = tokenizers.Tokenizer(models.BPE(vocab, merges))
    theirs.pre_tokenizer = cut
    if name == "stablelm2":  # whose own code, tokenization_arcade100k.py, normalizes first
        theirs.normalizer = NFC()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("name", ["smollm", "starcoder", "refact", "codeshell"])
def test_digits_stand_alone(name: str) -> None:
    tokenizer = read(byte_level(GPT2_CUT) | {"pre": name})
    assert [tokenizer.token(id_) for id_ in tokenizer.encode("a 1234 b")][:6] == ["a", " ", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("default", "it's 1234567!! x", ["it", "'", "s", "\u0120", "123", "456", "7", "!!", "\u0120x"]),
        ("default", "a <b> ٣٤", ["a", "\u0120", "<", "b", ">", "\u0120", "Ù£Ù¤"]),
        ("superbpe", "by the way 1234567 12", ["by\u0120the\u0120way\u0120", "1", "234", "567", "\u0120", "12"]),
    ],
)
def test_texts_are_cut_as_llama_cpp_cuts_them(name: str, text: str, expected: list[str]) -> None:
    """By hand, from its patterns: there is no library to ask."""
    pre_tokenizer = PRE_TOKENIZERS[name].build()
    assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] == expected


def test_bytes_without_a_token_are_dropped_as_by_the_models_own_tokenizer() -> None:
    keys = byte_level(GPT2_CUT) | {"pre": "gpt-2"}
    keys["tokens"][keys["tokens"].index("\u0104")] = "none"  # byte 4
    tokenizer = read(keys)
    assert tokenizer.encode("a\x04b") == tokenizer.encode("a") + tokenizer.encode("b")
