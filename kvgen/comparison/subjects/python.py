"""A user's model from a Python file as the subject of a comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvgen.backends.python import PythonBackend
from kvgen.comparison.subjects.subject import Subject
from kvgen.comparison.subjects.widened import widened
from kvgen.errors import ModelError


class PythonSubject(Subject):
    """Reads the declarations in the model's attributes, and passes positions if the model accepts them."""

    def __init__(self, backend: PythonBackend) -> None:
        super().__init__(backend)
        self._backend, self.module = backend, backend.module
        self.cannot_cache, self.lossy = backend.declared("cannot_cache"), backend.declared("lossy")
        self.changes_at = backend.changes_at

    def with_positions(self, ids: Tensor, cache: Any, positions: Tensor) -> tuple[Tensor, Any]:
        if not self._backend.takes_positions:
            return super().with_positions(ids, cache, positions)
        return self._backend.call(ids, cache, positions=positions)

    def in_dtype(self, dtype: torch.dtype) -> PythonSubject | None:
        """For a torch module whose logits have the dtype of its weights."""
        if self.module is None:
            return None
        try:
            twin = PythonBackend(widened(self.module, dtype))
            logits, _ = twin(torch.zeros(1, 1, dtype=torch.int64, device=self.backend.device), None)
        except (ModelError, RuntimeError, TypeError):  # it cannot be copied, or requires one dtype
            return None
        twin.dtype = dtype
        return PythonSubject(twin) if logits.dtype == dtype else None
