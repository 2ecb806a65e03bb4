"""How surprising each token of a text is, for eyes: the text in colours, or a line for each token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from kvgen.cli.escape import escape_controls

if TYPE_CHECKING:
    from kvgen import Score, Tokenizer

# Up to so many bits of surprise, and the colour of the ground: from calm to hot.
_HEAT = ((1.0, 22), (2.0, 64), (4.0, 100), (7.0, 136), (10.0, 130), (14.0, 124), (math.inf, 160))
_CALM = 4.0  # bits that need no mark where there are no colours
_SUBSCRIPT = str.maketrans({digit: 0x2080 + value for value, digit in enumerate("0123456789")})
_NOT_SCORED = "dim"
_MOST_MAPPED = 4000  # tokens: a screen cannot hold more
_MOST_TOKENS = 4  # that make one character of UTF-8, if each is a byte of it
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def heat_map(score: Score, tokenizer: Tokenizer, *, coloured: bool = True) -> Text:
    """The text, each piece on the colour of its surprise. Tokens that make one character share the sum of theirs.

    coloured: whether there are colours to see; without them, a small number stands behind what surprises.
    """
    heat = Text()
    for piece, places in pieces(score.ids[:_MOST_MAPPED], tokenizer):
        logprobs = [score.logprobs[place] for place in places]
        scored = [logprob for logprob in logprobs if logprob is not None]
        shown = escape_controls(piece).replace("\n", "\u23ce\n")  # a line break has no ground to colour
        bits = sum(map(surprise, scored))
        heat.append(shown, _style(bits) if scored else _NOT_SCORED)
        if not coloured and bits > _CALM:
            heat.append("\u221e" if math.isinf(bits) else f"{bits:.0f}".translate(_SUBSCRIPT))
    if len(score.ids) > _MOST_MAPPED:
        heat.append(f"\n... and {len(score.ids) - _MOST_MAPPED} more tokens", "dim")
    return heat


def legend(*, coloured: bool = True) -> Text:
    """Which colour is how much."""
    if not coloured:
        return Text(f"small numbers: bits of surprise of the piece before, where they are more than {_CALM:g}")
    line, lower = Text("bits of surprise: "), 0.0
    for upper, _ in _HEAT:
        label = f" {lower:g}-{upper:g} " if math.isfinite(upper) else f" over {lower:g} "
        line.append(label, _style(upper)).append(" ")
        lower = upper
    return line


def table(score: Score, tokenizer: Tokenizer) -> Iterator[str]:
    """A line for each token: log-likelihood, surprise, id, text. Of a token that is part of a character, which."""
    for piece, places in pieces(score.ids, tokenizer):
        shown = escape_controls(piece).replace("\n", "\\n").replace("\t", "\\t")
        for place in places:
            id_, logprob = score.ids[place], score.logprobs[place]
            numbers = ("-", "-") if logprob is None else (f"{logprob:.4f}", f"{surprise(logprob):.2f}")
            part = f" ({places.index(place) + 1}/{len(places)})" if len(places) > 1 else ""
            yield f"{numbers[0]:>10}{numbers[1]:>8}{id_:>8}  {shown}{part}"


def surprise(logprob: float) -> float:
    """Of nats of log-likelihood, the bits of surprise."""
    return -logprob / math.log(2)


def pieces(ids: tuple[int, ...], tokenizer: Tokenizer) -> Iterator[tuple[str, range]]:
    """The text in its smallest parts: whole characters, and for each the places of its tokens in `ids`.

    Without special tokens, which are parts of their own, the parts add up to `tokenizer.decode(ids)`.

    A stream's detokenizer waits for the end of a run of byte tokens, and gives it out with the token after it. Here the
    token after it needs a colour of its own. As there, the ids that are decoded start at a part that is out already.
    """
    anchor = start = 0
    for place, id_ in enumerate(ids):
        known = len(tokenizer.decode(ids[anchor:start]))
        if id_ in tokenizer.special_ids:
            if start < place:
                yield tokenizer.decode(ids[anchor:place])[known:], range(start, place)
            yield tokenizer.token(id_), range(place, place + 1)
            start = place + 1
            continue
        piece = tokenizer.decode(ids[anchor : place + 1])[known:]
        is_whole = not piece.endswith(_UNFINISHED) or place + 1 - start == _MOST_TOKENS
        if is_whole or place + 1 == len(ids):
            yield piece, range(start, place + 1)
            anchor, start = start, place + 1


def _style(bits: float) -> str:
    colour = next(colour for upper, colour in _HEAT if bits <= upper)
    return f"white on color({colour})"
