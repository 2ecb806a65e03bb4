"""SentencePiece-style BPE in the `tokenizers` library: merges by score, with byte fallback."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers

SPACE = "\u2581"  # replaces the space in these vocabularies
_ODD = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's fraction
_Ints = NDArray[np.int64]
_Hash = NDArray[np.uint64]
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def build_backend(
    tokens: Sequence[str], scores: Sequence[float], is_piece: Sequence[bool], unknown: str | None, *, prefix_space: bool
) -> tokenizers.Tokenizer:
    """Build a tokenizer without added tokens.

    tokens, scores: by id.
    is_piece: whether merging may produce the token; false for special, user-defined and byte tokens.
    unknown: the unknown token, for vocabularies without byte tokens.
    prefix_space: whether to put a space before a text, and after each special token.
    """
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    merges = merges_by_score(tokens, scores, is_piece)
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    spaces = [normalizers.Prepend(SPACE)] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def merges_by_score(tokens: Sequence[str], scores: Sequence[float], is_piece: Sequence[bool]) -> list[tuple[str, str]]:
    """Return every pair of pieces that forms a piece, best score first, which is SentencePiece's merge order.

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
