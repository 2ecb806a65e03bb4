"""Plain text of any length to complete: the same for the same seed, and different from its first word on for others."""

from __future__ import annotations

import random

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city name team minute idea body back face "
    "level office door health person art war history party result change morning reason research girl guy moment "
    "air teacher force "
)
_VERBS = "has saw made found took gave kept left told heard showed asked used called needed became followed "
_LINKS = "and of in with for from after before under over near about without against between behind "
_SENTENCE = (6, 14)  # words


def compose(words: int, seed: int) -> str:
    """Return `words` words in sentences."""
    source, kinds = random.Random(seed), [kind.split() for kind in (_WORDS, _WORDS, _VERBS, _LINKS)]
    text: list[str] = []
    while len(text) < words:
        length = source.randint(*_SENTENCE)
        sentence = [source.choice(kinds[place % 4]) for place in range(length)]
        text += [sentence[0].capitalize(), *sentence[1:-1], f"{sentence[-1]}."]
    return " ".join(text[:words])
