"""Benchmarks of a model through the contract: prefill, decode, cached against uncached decoding, memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kvgen.contract import Backend
from kvgen.errors import UsageError

PROMPTS = (128, 512, 2048)
CONTEXTS = (16, 512, 2048)
LENGTHS = (16, 64, 256, 1024)
_STEPS = 16  # timed at each context

T = TypeVar("T")


@dataclass(frozen=True)
class Prefill:
    """A pass over a prompt of `tokens`. seconds: median."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Decode:
    """A step after `context` tokens. seconds: median.

    bandwidth: bytes per second of weights, keys and values that a step reads; None if unknown.
    cache_bytes: of keys and values after the last step; None if unknown.
    """

    context: int
    seconds: float
    bandwidth: float | None
    cache_bytes: int | None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return 1 / self.seconds


@dataclass(frozen=True)
class Growth:
    """Median seconds of a step after `length` tokens, with and without a cache."""

    length: int
    cached: float
    uncached: float

    @property
    def speedup(self) -> float:
        return self.uncached / self.cached


@dataclass(frozen=True)
class Benchmark:
    """All measurements of a model.

    weight_bytes, cache_bytes: of the weights, and of the cache at the longest context; None if unknown.
    peak_bytes: peak memory of the process; None if the system does not report it.
    memory_bandwidth: measured bytes per second that all threads together read from memory.
    """

    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    growth: tuple[Growth, ...]
    weight_bytes: int | None
    cache_bytes: int | None
    peak_bytes: int | None
    memory_bandwidth: float
    threads: int


def measure(
    model: Backend,
    *,
    prompts: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    repeat: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Benchmark:
    """Time a model on random tokens.

    prompts: lengths to prefill. contexts: lengths to decode after. lengths: of the comparison with uncached decoding.
    None for those of PROMPTS, CONTEXTS and LENGTHS that fit the model's context.
    repeat: runs per median. progress: called with the number of measurements done, and in total.

    Raises UsageError for lengths that do not fit the model's context.
    """
    limit = model.context_length or sys.maxsize
    prompts = [n for n in PROMPTS if n <= limit] if prompts is None else prompts
    contexts = [n for n in CONTEXTS if n + _STEPS <= limit] if contexts is None else contexts
    lengths = [n for n in LENGTHS if n + _STEPS <= limit] if lengths is None else lengths
    longest = max((*prompts, *(length + _STEPS for length in (*contexts, *lengths))), default=0)
    if longest > limit:
        raise UsageError(f"{longest} tokens do not fit the model's context of {model.context_length}: measure fewer")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size or 256, (1, max(longest, 1)), generator=generator).to(model.ids_device)
    total, done = len(prompts) + len(contexts) + len(lengths) + 1, 0

    def count(result: T) -> T:
        nonlocal done
        done += 1
        progress(done, total)
        return result

    model(ids[:, :2], None)  # warm up
    prefill = [count(Prefill(length, _forward_seconds(model, ids[:, :length], repeat))) for length in prompts]
    decode = [count(_decode(model, ids, context, repeat)) for context in contexts]
    growth = [count(_growth(model, ids, length, repeat)) for length in lengths]
    return Benchmark(
        tuple(prefill),
        tuple(decode),
        tuple(growth),
        model.weight_bytes,
        max((row.cache_bytes for row in decode if row.cache_bytes is not None), default=None),
        _peak_memory(),
        count(_memory_bandwidth(model.device)),
        torch.get_num_threads(),
    )


def _memory_bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over 256 MB, best of five."""
    numbers = torch.ones(2**26, device=device)
    return numbers.nbytes / min(_seconds(lambda: float(numbers.sum())) for _ in range(5))


def _peak_memory() -> int | None:
    """Peak memory of this process, in bytes; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _decode(model: Backend, ids: Tensor, context: int, repeat: int) -> Decode:
    times = []
    for _ in range(repeat):
        _, cache = model(ids[:, :context], None)
        for end in range(context + 1, context + _STEPS + 1):
            start = time.perf_counter()
            logits, cache = model(ids[:, :end], cache)
            float(logits[0, -1, 0])  # waits for a GPU
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    held: int | None = getattr(cache, "nbytes_held", None)
    read = None if model.step_bytes is None or held is None else model.step_bytes + held
    return Decode(context, seconds, None if read is None else read / seconds, held)


def _growth(model: Backend, ids: Tensor, length: int, repeat: int) -> Growth:
    cached = _decode(model, ids, length, repeat).seconds
    return Growth(length, cached, _forward_seconds(model, ids[:, : length + 1], max(1, repeat // 2)))


def _forward_seconds(model: Backend, ids: Tensor, repeat: int) -> float:
    """Median time of an uncached pass; reading a logit waits for a GPU."""
    return statistics.median(_seconds(lambda: float(model(ids, None)[0][0, -1, 0])) for _ in range(repeat))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
