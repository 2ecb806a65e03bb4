"""Show how surprising each token of a text is: as coloured text, or one line per token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from kvgen.cli.render import escape_controls

if TYPE_CHECKING:
    from kvgen import Score, Tokenizer
    from kvgen.client.remote import RemoteTokenizer

# Upper limits in bits of surprise, each with its background colour.
_HEAT = ((1.0, 22), (2.0, 64), (4.0, 100), (7.0, 136), (10.0, 130), (14.0, 124), (math.inf, 160))
_MARKED_ABOVE = 4.0  # bits, on terminals without colours
_SUBSCRIPT = str.maketrans({digit: 0x2080 + value for value, digit in enumerate("0123456789")})
_MAX_MAPPED = 4000  # tokens; a screen cannot show more


def heat_map(score: Score, tokenizer: Tokenizer | RemoteTokenizer, *, coloured: bool = True) -> Text:
    """Return the text with background colours for surprise. Tokens of one character share the sum of their surprise.

    coloured: False marks surprising pieces with a small number instead.
    """
    heat = Text()
    for piece, places in tokenizer.pieces(score.ids[:_MAX_MAPPED]):
        scored = [logprob for place in places if (logprob := score.logprobs[place]) is not None]
        shown = escape_controls(piece).replace("\n", "\u23ce\n")  # a line break alone shows no colour
        bits = sum(map(surprise, scored))
        heat.append(shown, _style(bits) if scored else "dim")
        if not coloured and bits > _MARKED_ABOVE:
            heat.append("\u221e" if math.isinf(bits) else f"{bits:.0f}".translate(_SUBSCRIPT))
    if len(score.ids) > _MAX_MAPPED:
        heat.append(f"\n... and {len(score.ids) - _MAX_MAPPED} more tokens", "dim")
    return heat


def legend(*, coloured: bool = True) -> Text:
    """Return the line that explains the colours or numbers of `heat_map`."""
    if not coloured:
        return Text(f"small numbers: bits of surprise of the text before, if above {_MARKED_ABOVE:g}")
    line, lower = Text("bits of surprise: "), 0.0
    for upper, _ in _HEAT:
        label = f" {lower:g}-{upper:g} " if math.isfinite(upper) else f" over {lower:g} "
        line.append(label, _style(upper)).append(" ")
        lower = upper
    return line


def table(score: Score, tokenizer: Tokenizer | RemoteTokenizer) -> Iterator[str]:
    """Yield a line per token: log-likelihood, surprise, id, text, and its part if several tokens make a character."""
    for piece, places in tokenizer.pieces(score.ids):
        shown = escape_controls(piece).replace("\n", "\\n").replace("\t", "\\t")
        for place in places:
            id_, logprob = score.ids[place], score.logprobs[place]
            numbers = ("-", "-") if logprob is None else (f"{logprob:.4f}", f"{surprise(logprob):.2f}")
            part = f" ({places.index(place) + 1}/{len(places)})" if len(places) > 1 else ""
            yield f"{numbers[0]:>10}{numbers[1]:>8}{id_:>8}  {shown}{part}"


def surprise(logprob: float) -> float:
    """Convert log-likelihood in nats to surprise in bits."""
    return -logprob / math.log(2)


def _style(bits: float) -> str:
    colour = next(colour for upper, colour in _HEAT if bits <= upper)
    return f"white on color({colour})"
