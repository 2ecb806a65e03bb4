"""Sampling: pure filters on logits, and the sampler that composes them.

Order, as in transformers where it has the filter: logit bias, repetition penalty, presence and frequency penalties,
temperature, top-k, top-p, min-p, typical-p. Each takes logits, (vocab,), and returns new ones, with -inf for the tokens
that it removes; at least one token stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from kvgen.errors import ModelError, UsageError
from kvgen.generation.settings import Sampling

Sampler = Callable[[Tensor, Sequence[int], int], int]
"""(logits, (vocab,) fp32 on the CPU; ids so far; how many of them are the prompt) -> the next id."""

Filter = Callable[[Tensor], Tensor]

_TOP_P_CANDIDATES = 256
_TOP_P_MARGIN = 1e-5  # probability


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: waking the others takes longer than the work on one row of logits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_sampler(settings: Sampling) -> Sampler:
    """Compose the settings into a sampler with its own random generator."""
    penalties = _penalties(settings)
    if settings.temperature == 0:
        # NumPy's argmax is five times as fast as torch's; both return the first maximum.
        return lambda logits, ids, prompt_length: int(penalties(logits, ids, prompt_length).numpy().argmax())
    filters = _filters(settings)
    generator = torch.Generator()
    if settings.seed is None:
        generator.seed()
    else:
        generator.manual_seed(settings.seed)

    def sample(logits: Tensor, ids: Sequence[int], prompt_length: int) -> int:
        logits = penalties(logits, ids, prompt_length)
        for apply in filters:
            logits = apply(logits)
        return draw(logits, generator)

    return sample


def _filters(settings: Sampling) -> list[Filter]:
    """Return the enabled filters in order."""
    filters: list[tuple[bool, Filter]] = [
        (settings.temperature != 1, partial(scale, temperature=float(settings.temperature))),
        (settings.top_k > 0, partial(top_k, k=settings.top_k)),
        (settings.top_p < 1, partial(top_p, p=settings.top_p)),
        (settings.min_p > 0, partial(min_p, p=settings.min_p)),
        (settings.typical_p < 1, partial(typical_p, mass=settings.typical_p)),
    ]
    return [apply for enabled, apply in filters if enabled]


def _penalties(settings: Sampling) -> Callable[[Tensor, Sequence[int], int], Tensor]:
    """Compose the logit bias and the penalties, which depend on the ids so far."""
    bias_ids = torch.tensor(list(settings.logit_bias), dtype=torch.int64)
    bias = torch.tensor(list(settings.logit_bias.values()), dtype=torch.float32)

    def apply(logits: Tensor, ids: Sequence[int], prompt_length: int) -> Tensor:
        if len(bias_ids):
            if int(bias_ids.max()) >= len(logits) or int(bias_ids.min()) < 0:
                raise UsageError(f"logit_bias names a token id outside the vocabulary of {len(logits)}")
            logits = logits.index_add(0, bias_ids, bias)
        if settings.repetition_penalty != 1:
            logits = repetition_penalty(logits, torch.tensor(ids), settings.repetition_penalty)
        if settings.presence_penalty or settings.frequency_penalty:
            counts = torch.bincount(torch.tensor(ids[prompt_length:], dtype=torch.int64), minlength=len(logits))
            logits = logits - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
        return logits

    return apply


def repetition_penalty(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the tokens in `ids` by the penalty."""
    seen = logits[ids]
    return logits.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def draw(logits: Tensor, generator: torch.Generator) -> int:
    """Sample a token by inverting the cumulative distribution.

    Ten times as fast as torch.multinomial, which draws a number for each token of the vocabulary. Raises ModelError if
    all probabilities are zero.
    """
    sums = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    if not float(sums[-1]) > 0:
        raise ModelError("no token can be sampled: with these settings every probability is zero")
    point = torch.rand(1, dtype=torch.float64, generator=generator) * sums[-1]
    last = torch.searchsorted(sums, sums[-1:])  # the last token with a probability above zero
    return int(torch.minimum(torch.searchsorted(sums, point, right=True), last))


def scale(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature."""
    scaled: Tensor = logits / temperature
    # A tiny temperature would overflow; softmax sees only differences, so shift the largest logit to 0.
    return scaled if scaled.max().isfinite() else ((logits - logits.max()).double() / temperature).float()


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and ties with the k-th."""
    if k >= len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities add up to at least p."""
    likely, indices = logits.topk(min(_TOP_P_CANDIDATES, len(logits)))  # sorting all takes longer than a model's step
    held = (likely - logits.logsumexp(-1)).exp().cumsum(-1)
    kept = int((held < p).sum()) + 1
    # Ties, and sums within rounding of p, are decided as in transformers, by the sort below.
    if kept < len(held) and likely[kept - 1] > likely[kept] and (held - p).abs().min() > _TOP_P_MARGIN:
        return torch.full_like(logits, -torch.inf).scatter(0, indices[:kept], likely[:kept])
    ordered, order = logits.sort(descending=False)
    below = ordered.softmax(-1).cumsum(-1)  # cumulative probability, from the least likely token
    dropped = below <= 1 - p
    dropped[-1] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the most likely one."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), -torch.inf)


def typical_p(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is closest to the entropy, until their probabilities add up to `mass`."""
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).nansum()
    distance, order = (-log_probabilities - entropy).abs().sort()
    held = probabilities[order].cumsum(-1)
    last = min(int((held < mass).sum()), len(logits) - 1)
    dropped = distance > distance[last]
    dropped[0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -torch.inf)
