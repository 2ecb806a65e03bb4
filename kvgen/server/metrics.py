"""Figures of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvgen.server.engine import Engine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Renders the figures of an engine."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        times = {"first_token": "From the request to its first token.", "between_tokens": "From a token to the next."}
        self._histograms = {
            name: Histogram(f"kvgen_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)
            for name, text in times.items()
        }
        self._registry.register(self)

    def render(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        counts = self._engine.counts
        for name, histogram in self._histograms.items():
            seen: list[float] = getattr(counts, name)
            taken = seen[:]  # the engine's thread appends meanwhile
            del seen[: len(taken)]
            for seconds in taken:
                histogram.observe(seconds)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        counts = self._engine.counts
        totals = {
            "kvgen_prompt_tokens": (counts.prompt_tokens, "Tokens of prompts."),
            "kvgen_completion_tokens": (counts.completion_tokens, "Tokens generated."),
            "kvgen_positions_reused": (counts.reused, "Positions that were in a cache."),
            "kvgen_positions_computed": (counts.computed, "Positions that the model computed."),
        }
        for name, (value, text) in totals.items():
            yield CounterMetricFamily(name, text, value=value)
        now = {
            "kvgen_requests_running": (self._engine.running, "Requests with a first token."),
            "kvgen_requests_waiting": (self._engine.waiting, "Requests without one."),
            "kvgen_kept_cache_bytes": (self._engine.kept_bytes, "Memory of the caches of finished requests."),
        }
        for name, (value, text) in now.items():
            yield GaugeMetricFamily(name, text, value=value)
