"""What rounding alone does to this model's logits. Everything is judged against this, not against a fixed number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvgen.contract import Backend
from kvgen.rounding import LIMIT, eps, rms, typical_floor

_FLOAT64_RELATIVE = 1e-11  # of the size of the logits; float64 itself rounds at 1e-16


@dataclass(frozen=True)
class Noise:
    """The noise floor of a model on one text.

    floor: the size of rounding errors, as the root mean square over the vocabulary at the worst step.
    worst: the largest rounding error of a single logit.
    how: `float64`, errors against the same model in float64; or `spread`, differences between equivalent ways to
        compute the same logits.
    exact: what candidates are held against, (steps, vocab): float64 logits, or the reference's own.
    """

    floor: float
    worst: float
    how: Literal["float64", "spread"]
    exact: Tensor

    def ratio(self, logits: Tensor) -> float:
        """How many noise floors `logits`, (steps, vocab), are away from the exact ones, at the worst step."""
        return float(rms(logits - self.exact).max()) / self.floor

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Whether two computations of one step's logits, (vocab,), differ by no more than rounding."""
        return float(rms(a.cpu().double() - b.cpu().double())) <= LIMIT * self.floor


def measure_noise(backend: Backend, twin: Backend | None, ids: Tensor, start: int, reference: Tensor) -> Noise:
    """Measure the floor on the text `ids`, (1, n), whose steps begin after `start` positions.

    twin: the backend in float64, if there is one. reference: uncached logits, (steps, vocab).
    """
    ways = [reference]
    parallel = backend.all_logits(ids)
    if parallel is not None:
        ways.append(parallel[0, start - 1 : -1].cpu())
    exact = None if twin is None else step_logits(twin, ids, start)
    errors = [way - (reference if exact is None else exact) for way in ways]
    # No computation is better than one rounding; without float64 a typical error is taken for the least.
    least = (
        eps(backend.dtype) * float(rms(reference).max())
        if exact is not None
        else typical_floor(reference, backend.dtype)
    )
    return Noise(
        floor=max(least, *(float(rms(error).max()) for error in errors)),
        worst=max(least, *(float(error.abs().max()) for error in errors)),
        how="spread" if exact is None else "float64",
        exact=reference.double() if exact is None else exact.double(),
    )


def float64_noise(twin: Backend, ids: Tensor, start: int, exact: Tensor) -> Noise:
    """The floor of a model in float64, between equivalent ways to compute `exact`, (steps, vocab).

    It is far above float64's own rounding: a library may do a part in float32 all the same. Structural faults are
    orders of magnitude larger still.
    """
    length = min(start + 1, ids.shape[1] - 1)
    logits, _ = twin(ids[:, :length], None)
    error = logits[0, -1].cpu().double() - exact[length - start]
    floor = max(float(rms(error)), _FLOAT64_RELATIVE * float(rms(exact).max()))
    return Noise(floor, max(floor, float(error.abs().max())), "spread", exact)


def step_logits(backend: Backend, ids: Tensor, start: int) -> Tensor:
    """Uncached logits after `start`, start + 1, ... n - 1 positions: (steps, vocab), by one pass if possible."""
    parallel = backend.all_logits(ids)
    if parallel is not None:
        return parallel[0, start - 1 : -1].cpu()
    rows = [backend(ids[:, :length], None)[0][0, -1].cpu() for length in range(start, ids.shape[1])]
    return torch.stack(rows)
