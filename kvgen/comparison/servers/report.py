"""A comparison over HTTP as plain data, in the form of other comparisons: `--json` and `--junit` take it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvgen.comparison.servers.comparison import ServerComparison
from kvgen.comparison.servers.probes import ServerProbe
from kvgen.comparison.verdict import Verdict
from kvgen.generation.counts import finite


def as_data(result: ServerComparison) -> dict[str, Any]:
    """Return all results in JSON types: one comparison with one pattern, `cached`, and its probes."""
    pattern = {
        "pattern": "cached",
        "verdict": result.verdict.value,
        "reason": result.reason,
        "write_instead": "",
        "tokens_per_second": None,
        "probes": [_probe(probe) for probe in result.probes],
        "findings": [asdict(finding) for finding in result.findings],
    }
    return {
        "model": result.model,
        "backend": result.server,
        "url": result.url,
        "acceptable": result.acceptable,
        "requests": result.requests,
        "seconds": result.seconds,
        "comparisons": [
            {
                "prompt": result.prompt,
                "prompt_length": result.length,
                "text_ids": [],
                "acceptable": result.acceptable,
                "not_tested": result.not_tested,
                "cross_check": None,
                "patterns": [pattern],
            }
        ],
    }


def _probe(probe: ServerProbe) -> dict[str, Any]:
    ratio = probe.distance / probe.noise if probe.noise else 0.0
    return {
        "name": probe.name,
        "verdict": probe.verdict.value,
        "wrong": probe.wrong,
        "ratio": finite(ratio),
        "difference": finite(probe.distance),
        "noise": probe.noise,
        "length": probe.length,
        "reused": probe.reused,
        "near_tie": probe.near_tie,
        "note": probe.note or ("not comparable" if probe.verdict is Verdict.NOT_COMPARABLE else ""),
        "finding": ["different", "Cached and uncached answers differ by more than the noise."] if probe.wrong else None,
    }
