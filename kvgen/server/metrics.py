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
        self._first_token = self._histogram("first_token", "From the request to its first token.")
        self._between_tokens = self._histogram("between_tokens", "From a token to the next.")
        self._registry.register(self)
        engine.on_token = self._observe

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"kvgen_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)

    def _observe(self, seconds: float, first: bool) -> None:
        (self._first_token if first else self._between_tokens).observe(seconds)

    def render(self) -> bytes:
        """Return the figures in Prometheus' text format."""
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
