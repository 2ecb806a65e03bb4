"""SentencePiece-style BPE in the `tokenizers` library: merges by score, with byte fallback."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

SPACE = "\u2581"  # replaces the space in these vocabularies
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
    model = models.BPE(
        vocab, merges_by_score(vocab, scores, is_piece), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    spaces = [normalizers.Prepend(SPACE)] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def merges_by_score(vocab: dict[str, int], scores: Sequence[float], is_piece: Sequence[bool]) -> list[tuple[str, str]]:
    """Return every pair of pieces that forms a piece, best score first, which is SentencePiece's merge order.

    Pairs that form the same piece are sorted by their ids, as in transformers' conversion.
    """
    pieces = {token: id_ for token, id_ in vocab.items() if is_piece[id_]}
    merges: list[tuple[str, str]] = []
    for token in sorted(pieces, key=lambda token: -scores[pieces[token]]):
        pairs = []
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in pieces and (right := token[cut:]) in pieces:  # a vocabulary has millions of cuts: keep it fast
                pairs.append((left, right))
        merges += sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    return merges
