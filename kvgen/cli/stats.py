"""Counts, times and rates of completions, and how they are shown."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvgen.generation.counts import total

if TYPE_CHECKING:
    from kvgen import Chunk, Loaded, Sampling
    from kvgen.client.remote import Remote, RemoteModel
    from kvgen.contract import Backend
    from kvgen.generation.settings import Request
    from kvgen.pipeline.complete import Result


@dataclass
class Meter:
    """Collects the chunks of one completion and their times, in seconds.

    Prefill is the first step, over the prompt; decoding is the steps after it.
    """

    chunks: list[Chunk] = field(default_factory=list)
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    def add(self, chunk: Chunk, pass_began: float) -> None:
        """Add the next chunk. pass_began: `time.perf_counter()` at the start of the pass that computed it."""
        self.ended = time.perf_counter()
        if not self.chunks:
            self.started, self.first = pass_began, self.ended
        self.chunks.append(chunk)

    @property
    def last(self) -> Chunk:
        return self.chunks[-1]

    @property
    def prefill_seconds(self) -> float:
        return self.first - self.started

    @property
    def prompt_tokens(self) -> int:
        return self.chunks[0].step.positions

    def as_json(self) -> dict[str, Any]:
        """Return counts and rates. Positions and the prefill rate are None if the cache does not report them."""
        steps = [chunk.step for chunk in self.chunks]
        computed, decoded = steps[0].computed, len(steps) - 1
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(steps),
            "positions_reused": total(step.reused for step in steps),
            "positions_computed": total(step.computed for step in steps),
            "drafted_tokens": sum(step.drafted for step in steps),
            "accepted_tokens": sum(step.guessed for step in steps),
            "dropped_tokens": steps[-1].dropped,
            "first_token_seconds": round(self.prefill_seconds, 4),
            "prefill_tokens_per_second": None if computed is None else round(computed / self.prefill_seconds, 1),
            "decode_tokens_per_second": round(decoded / (self.ended - self.first), 1) if decoded else None,
        }


@dataclass
class Totals:
    """Counts of a batch run. not_json: failed rows that are not valid JSON."""

    rows: int = 0
    failed: int = 0
    not_json: int = 0
    tokens: int = 0
    reused: int | None = 0
    computed: int | None = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: Result) -> None:
        self.rows, self.failed, self.tokens = self.rows + 1, self.failed + result.failed, self.tokens + result.tokens
        self.not_json += result.failed and result.value["error"].startswith("not valid JSON")
        self.reused, self.computed = total((self.reused, result.reused)), total((self.computed, result.computed))

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.started
        return (
            f"{self.rows} rows, {self.failed} failed | {self.tokens} tokens in {seconds:.1f} s: "
            f"{self.rows / seconds:.1f} rows/s, {self.tokens / seconds:.1f} tok/s | "
            f"positions: {format_count(self.reused)} reused, {format_count(self.computed)} computed"
        )


def format_stats(meter: Meter, loaded: Loaded | Remote, load_seconds: float, sampling: Sampling) -> str:
    """Return the line that --stats prints after a completion."""
    stats, dtype = meter.as_json(), str(loaded.model.dtype).removeprefix("torch.")
    parts = [
        f"{format_tokens(meter.prompt_tokens, 'prompt ')}, {len(meter.chunks)} generated ({meter.last.finish_reason})",
        f"load {load_seconds:.2f} s, first token {meter.prefill_seconds:.2f} s",
        f"prefill {_format_rate(stats['prefill_tokens_per_second'])}, "
        f"decode {_format_rate(stats['decode_tokens_per_second'])}",
        f"positions: {format_count(stats['positions_reused'])} reused, "
        f"{format_count(stats['positions_computed'])} computed",
    ]
    if stats["drafted_tokens"]:
        parts.append(f"drafts: {stats['accepted_tokens']} of {stats['drafted_tokens']} accepted")
    if stats["dropped_tokens"]:
        parts.append(f"--max-context: {format_tokens(stats['dropped_tokens'])} dropped")
    return " | ".join([*parts, f"seed {sampling.seed}", f"{dtype} on {loaded.model.device}, {loaded.model.engine}"])


def format_cache(model: Backend | RemoteModel, request: Request) -> str:
    """Return the line that --stats prints before a completion: the expected size of the cache."""
    if model.position_bytes is None:
        return "cache: size unknown"
    positions = request.most_positions(model.context_length)
    size, limit = model.position_bytes / 1e3, model.cache_bytes(positions) / 1e6
    return f"cache: {size:.0f} kB per position, up to {limit:.0f} MB for {positions} positions"


def _format_rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1f} tok/s"


def format_count(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def format_tokens(count: int, kind: str = "") -> str:
    """Return, for example, `1 token` or `5 prompt tokens`. kind: a word with a space behind it."""
    return f"{count} {kind}token{'' if count == 1 else 's'}"
