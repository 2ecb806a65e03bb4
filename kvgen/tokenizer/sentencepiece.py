"""SentencePiece-style BPE in the `tokenizers` library: merges by score, with byte fallback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, normalizers

from kvgen.tokenizer.special_tokens import encode_text
from kvgen.tokenizer.tokenizer import Tokenizer
from kvgen.tokenizer.vocabulary import CompactVocabulary

SPACE = "\u2581"  # replaces the space in these vocabularies
_ODD = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's fraction
_FEW = 10_000  # characters; finding their merges takes 0.1 s or less
_Ints = NDArray[np.int64]
_Hash = NDArray[np.uint64]
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary whose merges follow from its scores.

    All merges of a large vocabulary take a second to find, and 20 MB. A text needs only those that form pieces of it,
    and has the same tokens with them. So the first texts are encoded with their own, until many characters were.
    """

    def __init__(
        self,
        vocabulary: CompactVocabulary,
        scores: NDArray[Any],
        is_piece: NDArray[np.bool_],
        *settings: Any,
    ) -> None:
        """scores, is_piece: see `merges_by_score`. settings: see `Tokenizer`."""
        super().__init__(vocabulary, *settings)
        self._tokens = vocabulary
        self._scores, self._is_piece = scores, is_piece
        self._encoded = 0  # characters

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        return self._with_merges(self._tokens.get_vocab(), self._tokens.get_added_tokens_decoder().values())

    @cached_property
    def longest(self) -> int:
        return self._tokens.ids.tokens.longest

    def _encode(self, text: str, *, parse_special: bool, add_special_tokens: bool) -> list[int]:
        self._encoded += len(text)
        backend = self.backend if self._encoded > _FEW else self._backend_for(text, parse_special)
        return encode_text(backend, text, parse_special=parse_special, add_special_tokens=add_special_tokens).ids

    def _backend_for(self, text: str, parse_special: bool) -> tokenizers.Tokenizer:
        """Return a tokenizer with those tokens that a text can have, and with tokens that do not matter to it."""
        added = [token for token in self._tokens.get_added_tokens_decoder().values() if token.content in text]
        unknown = self._tokens.settings.model.unk_token
        needed = {SPACE, *text, *BYTES, *(token.content for token in added), *([] if unknown is None else [unknown])}
        vocab = self._tokens.ids.of(needed)
        unmerged = encode_text(
            self._assembled(vocab, [], added), text, parse_special=parse_special, add_special_tokens=False
        ).tokens
        characters = "".join(token for token in unmerged if token not in BYTES)
        for size in range(2, self.longest + 1):
            parts = {characters[start : start + size] for start in range(len(characters) - size + 1)}
            vocab |= self._tokens.ids.of(parts)
        return self._with_merges(vocab, added)

    def _with_merges(self, vocab: Mapping[str, int], added: Iterable[AddedToken]) -> tokenizers.Tokenizer:
        """Return the tokenizer with the merges of a part of the vocabulary."""
        tokens = sorted(vocab, key=vocab.__getitem__)
        ids = [vocab[token] for token in tokens]
        return self._assembled(vocab, merges_by_score(tokens, self._scores[ids], self._is_piece[ids]), added)

    def _assembled(
        self, vocab: Mapping[str, int], merges: list[tuple[str, str]], added: Iterable[AddedToken]
    ) -> tokenizers.Tokenizer:
        settings = self._tokens.settings
        backend = _build(vocab, merges, settings.model.unk_token)
        backend.normalizer, backend.decoder = settings.normalizer, settings.decoder
        if settings.post_processor is not None:
            backend.post_processor = settings.post_processor
        backend.add_tokens(list(added))
        return backend


def build_settings(vocab: Mapping[str, int], unknown: str | None, *, prefix_space: bool) -> tokenizers.Tokenizer:
    """Build a tokenizer without merges and added tokens.

    vocab: the ids of the tokens that will be added, and of the unknown one.
    unknown: the unknown token, for vocabularies without byte tokens.
    prefix_space: whether to put a space before a text, and after each special token.
    """
    backend = _build(vocab, [], unknown)
    spaces = [normalizers.Prepend(SPACE)] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _build(vocab: Mapping[str, int], merges: list[tuple[str, str]], unknown: str | None) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.BPE(dict(vocab), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))


def merges_by_score(
    tokens: Sequence[str], scores: Sequence[float] | NDArray[Any], is_piece: Sequence[bool] | NDArray[np.bool_]
) -> list[tuple[str, str]]:
    """Return every pair of pieces that forms a piece, best score first, which is SentencePiece's merge order.

    tokens, scores: in the order of ids.
    is_piece: whether merging may produce the token; false for special, user-defined and byte tokens.
    Pairs that form the same piece are sorted by their ids, as in transformers' conversion.

    A vocabulary has millions of places to cut a piece in two, so all are looked up at once, by hashes of 64 bits.
    """
    ids = np.flatnonzero(np.asarray(is_piece, dtype=bool))
    ids = ids[np.argsort(-np.asarray(scores, dtype=np.float64)[ids], kind="stable")]
    texts = [tokens[id_] for id_ in ids.tolist()]
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    if not sizes.any():
        return []
    pieces = np.array(texts, dtype=object)[sizes > 0]
    ids, sizes = ids[sizes > 0], sizes[sizes > 0]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    hashes = _Hashes("".join(texts))
    whole = hashes.of(starts, ends)
    by_hash = np.argsort(whole)
    piece = np.repeat(np.arange(len(ids)), sizes)  # of each character
    cut = np.arange(len(piece))
    cut = cut[cut != starts[piece]]
    left, found = _find(hashes.of(starts[piece[cut]], cut), whole[by_hash])
    cut, left = cut[found], by_hash[left[found]]
    right, found = _find(hashes.of(cut, ends[piece[cut]]), whole[by_hash])
    cut, left, right = cut[found], left[found], by_hash[right[found]]
    order = np.argsort(piece[cut] * len(tokens) + ids[left])
    return list(zip(pieces[left[order]].tolist(), pieces[right[order]].tolist(), strict=True))


class _Hashes:
    """Hashes of parts of a text: sums of mixed characters times powers of an odd number, modulo 2^64."""

    def __init__(self, text: str) -> None:
        mixed = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64) + np.uint64(1)
        mixed *= _ODD
        mixed ^= mixed >> np.uint64(29)
        powers, inverses = (np.full(len(mixed) + 1, base, np.uint64) for base in (_ODD, pow(int(_ODD), -1, 1 << 64)))
        powers[0] = inverses[0] = 1
        self.inverses = np.cumprod(inverses)
        self.sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mixed * np.cumprod(powers)[:-1])))

    def of(self, starts: _Ints, ends: _Ints) -> _Hash:
        """Return the hash of the text from each start to its end, exclusive."""
        hashes: _Hash = (self.sums[ends] - self.sums[starts]) * self.inverses[starts]
        return hashes


def _find(wanted: _Hash, table: _Hash) -> tuple[_Ints, NDArray[np.bool_]]:
    """Return where each is in a sorted table, and whether it is; asked in order, which spares the CPU's cache."""
    order = np.argsort(wanted)
    at = np.empty(len(wanted), np.int64)
    at[order] = np.searchsorted(table, wanted[order])
    at[at == len(table)] = 0
    return at, table[at] == wanted
