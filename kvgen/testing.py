"""For tests of other libraries: assert that a model's cache is right. pytest offers it as the fixture of that name.

def test_cache(assert_cache_correct):
    assert_cache_correct(MyModel)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from kvgen.comparison import Comparison
    from kvgen.contract import Backend


def assert_cache_correct(
    model: Any,
    prompt: Sequence[int] | Tensor | None = None,
    *,
    steps: int = 32,
    patterns: Sequence[str] = ("full-sequence",),
    thorough: bool = False,
) -> Comparison:
    """Compare cached with uncached decoding, as `kvgen compare` does; fail with the reason if they are not equivalent.

    model: with the contract's signature `model(ids, cache) -> logits, cache`, or a function without arguments that
        returns one; a `Loaded` or `Backend` of kvgen; or a causal language model of transformers, with its own cache.
    prompt: token ids, also as a tensor, (n,) or (1, n); None for twelve fixed ones.
    steps, patterns, thorough: as `kvgen.compare`.

    Returns the comparison. Raises AssertionError if a right pattern is different, unsupported or not comparable;
    UsageError if the model is none of these, or the prompt is not the ids of one sequence.
    """
    from kvgen.comparison.comparison import compare_ids

    backend = _backend(model)
    ids = _some_ids(backend) if prompt is None else _listed(prompt)
    comparison = compare_ids(backend, ids, patterns=patterns, steps=steps, thorough=thorough)
    if not comparison.acceptable:
        lines = [
            f"{row.pattern.name}: {' '.join([row.verdict.value, row.reason])}".strip()
            + "".join(f"\n  {found.text} ({found.evidence})" for found in row.findings)
            for row in comparison.rows
            if row.pattern.right
        ]
        raise AssertionError("the cache is not right\n" + "\n".join(lines))
    return comparison


@pytest.fixture(name="assert_cache_correct")
def _fixture() -> Callable[..., Comparison]:
    """`kvgen.testing.assert_cache_correct`."""
    return assert_cache_correct


def _backend(model: Any) -> Backend:
    from kvgen.backends.python import PythonBackend
    from kvgen.contract import Backend
    from kvgen.errors import UsageError
    from kvgen.loading.load import Loaded

    if _is_factory(model):
        model = model()
    if isinstance(model, Loaded):
        return model.model
    if isinstance(model, Backend):
        return model
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        from kvgen.comparison.engines.transformers import TransformersBackend

        return TransformersBackend(model)
    if not callable(model):
        raise UsageError(f"{type(model).__name__} is not a model: it cannot be called as model(ids, cache)")
    return PythonBackend(model)


def _is_factory(model: Any) -> bool:
    """Whether it can be called without arguments; a module may also be called so, with defaults, but is a model."""
    from torch import nn

    if isinstance(model, nn.Module) or not callable(model):
        return False
    try:
        inspect.signature(model).bind()
    except (TypeError, ValueError):
        return False
    return True


def _listed(prompt: Sequence[int] | Tensor) -> list[int]:
    import torch

    from kvgen.errors import UsageError

    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the prompt must be token ids: {error}") from None
    if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        raise UsageError(f"the prompt has the shape {tuple(ids.shape)}; wanted the ids of one sequence")
    return ids.flatten().tolist()


def _some_ids(backend: Backend) -> list[int]:
    import torch

    size = backend.vocab_size or backend(torch.zeros(1, 1, dtype=torch.int64, device=backend.device))[0].shape[-1]
    length = min(12, max(1, (backend.context_length or 24) // 2))
    return torch.randint(0, size, (length,), generator=torch.Generator().manual_seed(7)).tolist()
