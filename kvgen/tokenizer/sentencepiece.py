"""SentencePiece-style BPE in the `tokenizers` library: merges by score, and bytes for what the vocabulary lacks."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

SPACE = "\u2581"  # what stands for a space in these vocabularies
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def build_backend(
    tokens: Sequence[str], scores: Sequence[float], is_piece: Sequence[bool], unknown: str | None, *, prefix_space: bool
) -> tokenizers.Tokenizer:
    """A tokenizer without its added tokens.

    tokens, scores: by id. is_piece: whether merging may lead to a token; special, user-defined and byte tokens are
    not pieces. unknown: the token for what has none, where there are no bytes. prefix_space: whether a text, and what
    follows a special token, begins with a space.
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
    """Every pair of pieces that makes a piece, the best-scored first.

    SentencePiece merges the neighbours whose union scores best; a list of pairs in that order says the same. Where a
    piece can be made in several ways, the pairs are in the order of their ids, as in transformers' conversion.
    """
    pieces = {token: id_ for token, id_ in vocab.items() if is_piece[id_]}
    merges: list[tuple[str, str]] = []
    for token in sorted(pieces, key=lambda token: -scores[pieces[token]]):
        pairs = []
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in pieces:  # most are not, and a vocabulary has millions of cuts
                right = token[cut:]
                if right in pieces:
                    pairs.append((left, right))
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        merges += pairs
    return merges
