"""Counting and timing one completion, from the chunks of the stream."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvgen.generation.counts import total

if TYPE_CHECKING:
    from kvgen import Chunk, Loaded, Sampling
    from kvgen.contract import Backend
    from kvgen.generation.settings import Request


@dataclass
class Meter:
    """Watches the chunks of a completion go by.

    prefill is the first step, over the prompt; decode the steps after it. Times are in seconds.
    """

    chunks: list[Chunk] = field(default_factory=list)
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    def add(self, chunk: Chunk, pass_began: float) -> None:
        """The next chunk; pass_began: when the pass began that gave it, by `time.perf_counter`."""
        self.ended = time.perf_counter()
        if not self.chunks:
            self.started, self.first = pass_began, self.ended
        self.chunks.append(chunk)

    @property
    def last(self) -> Chunk:
        return self.chunks[-1]

    @property
    def prefill_seconds(self) -> float:
        """From the start to the first token."""
        return self.first - self.started

    @property
    def decode_seconds(self) -> float:
        return self.ended - self.first

    @property
    def prompt_tokens(self) -> int:
        return self.chunks[0].step.positions

    @property
    def prefill_rate(self) -> float | None:
        """Prompt positions computed a second; None if the cache does not say how many were."""
        computed = self.chunks[0].step.computed
        return None if computed is None else computed / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first; None if there is only one."""
        return (len(self.chunks) - 1) / self.decode_seconds if len(self.chunks) > 1 else None

    @property
    def reused(self) -> int | None:
        """Positions taken from the cache, over all steps."""
        return total(chunk.step.reused for chunk in self.chunks)

    @property
    def computed(self) -> int | None:
        """Positions computed, over all steps."""
        return total(chunk.step.computed for chunk in self.chunks)

    @property
    def drafted(self) -> int:
        """Tokens that were guessed."""
        return sum(chunk.step.drafted for chunk in self.chunks)

    @property
    def accepted(self) -> int:
        """Of those, the ones that were right."""
        return sum(chunk.step.guessed for chunk in self.chunks)

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.chunks),
            "positions_reused": self.reused,
            "positions_computed": self.computed,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "first_token_seconds": round(self.prefill_seconds, 4),
            "prefill_tokens_per_second": _rounded(self.prefill_rate),
            "decode_tokens_per_second": _rounded(self.decode_rate),
        }


def format_stats(meter: Meter, loaded: Loaded, load_seconds: float, sampling: Sampling) -> str:
    """The line that --stats prints."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    prompt = format_tokens(meter.prompt_tokens, "prompt")
    drafts = f"drafts: {meter.accepted} of {meter.drafted} accepted" if meter.drafted else ""
    return " | ".join(
        part
        for part in (
            f"{prompt}, {len(meter.chunks)} generated ({meter.last.finish_reason})",
            f"load {load_seconds:.2f} s, first token {meter.prefill_seconds:.2f} s",
            f"prefill {_rate(meter.prefill_rate)}, decode {_rate(meter.decode_rate)}",
            f"positions: {format_count(meter.reused)} reused, {format_count(meter.computed)} computed",
            drafts,
            f"seed {sampling.seed} | {dtype} on {loaded.model.device}, {loaded.model.engine}",
        )
        if part
    )


def format_cache(model: Backend, request: Request) -> str:
    """The line of --stats before a completion: the memory that its cache may take."""
    if model.position_bytes is None:
        return "cache: of unknown size"
    positions = request.most_positions(model.context_length)
    most = positions * model.position_bytes / 1e6
    return f"cache: {model.position_bytes / 1e3:.0f} kB a position, at most {most:.0f} MB for {positions} positions"


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 1)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1f} tok/s"


def format_count(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def format_tokens(count: int, kind: str = "") -> str:
    return f"{count} {kind}{' ' * bool(kind)}token{'' if count == 1 else 's'}"
