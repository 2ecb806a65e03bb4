"""A comparison as plain data, for `--json`, the HTML page and tests."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvgen.comparison.comparison import Comparison, PatternResult
from kvgen.comparison.crosscheck import CrossCheck
from kvgen.generation.counts import finite
from kvgen.tokenizer import Tokenizer


def as_data(comparison: Comparison, tokenizer: Tokenizer, check: CrossCheck | None = None) -> dict[str, Any]:
    """Return all results of a comparison in JSON types. check: the comparison with another library, if there is one."""
    prompt = list(comparison.ids[: comparison.start])
    reference = comparison.rows[0]
    return {
        "prompt": tokenizer.decode(prompt),
        "prompt_ids": prompt,
        "text_ids": list(comparison.ids[comparison.start :]),
        "text": tokenizer.decode(comparison.ids[comparison.start :]),
        "acceptable": comparison.acceptable,
        "noise_floor": comparison.floor,
        "reference_max_abs": comparison.reference_gap,
        "not_tested": comparison.not_tested,
        "patterns": [_row_as_data(row, reference, comparison, tokenizer) for row in comparison.rows],
        "cross_check": None if check is None else _check_as_data(check),
    }


def speedup(row: PatternResult, reference: PatternResult) -> float | None:
    """Speed relative to uncached decoding; None if it did not run."""
    return reference.seconds / row.seconds if row.seconds and reference.seconds else None


def _split(row: PatternResult, tokenizer: Tokenizer) -> int | None:
    """Number of characters before the first token that differs; None if none does."""
    if row.tokens is None or row.first_difference is None:
        return None
    return len(tokenizer.decode(row.tokens[: row.first_difference]))


def _row_as_data(
    row: PatternResult, reference: PatternResult, comparison: Comparison, tokenizer: Tokenizer
) -> dict[str, Any]:
    return {
        "pattern": row.pattern.name,
        "what": row.pattern.summary,
        "verdict": row.verdict.value,
        "reason": row.reason,
        "exact": row.exact,
        "noise_floors": finite(row.ratio),
        "logits": None if row.gap is None else _numbers(asdict(row.gap)),
        "tokens": None if row.tokens is None else list(row.tokens),
        "completion": None if row.tokens is None else tokenizer.decode(row.tokens),
        "tokens_verdict": None if row.tokens_verdict is None else row.tokens_verdict.value,
        "first_difference": row.first_difference,
        "split": _split(row, tokenizer),
        "positions_computed": row.computed,
        "tokens_per_second": comparison.steps / row.seconds if row.seconds else None,
        "speedup": speedup(row, reference),
        "probes": [_numbers(asdict(probe)) for probe in row.probes],
        "findings": [asdict(finding) for finding in row.findings],
        "write_instead": row.pattern.advice,
    }


def _check_as_data(check: CrossCheck) -> dict[str, Any]:
    return {
        "reference": check.reference,
        "verdict": check.agreement.value,
        "logits": _numbers(asdict(check.gap)),
        "rms": finite(check.rms),
        "rounding_limit": check.limit,
        "positions": check.positions,
        "first_difference": check.length,
        "findings": [asdict(finding) for finding in check.findings],
    }


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    def of(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [of(one) for one in value]
        return finite(value) if isinstance(value, float) else value

    return {name: of(value) for name, value in data.items()}
