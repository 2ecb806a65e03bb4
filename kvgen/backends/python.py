"""The user's own model: a callable that a function in a Python file returns."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.contract import Backend
from kvgen.errors import KvgenError, ModelError, UnsupportedError, UsageError


class PythonBackend(Backend):
    """Any callable with the contract's signature. Logits may be for all positions, the new ones, or the last one.

    Optional attributes of the callable: `vocab_size`, `context_length`, and `rewinds = True` if its cache accepts any
    sequence, not only a continuation. For `kvgen compare`: `changes_at` (lengths where the computation changes, such as
    windows), `lossy` and `cannot_cache` (a reason). With a keyword parameter `positions`, (n,) int64 for the whole
    sequence, the diagnosis can tell wrong positions from other faults.
    """

    name = "python"

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.module = model if isinstance(model, nn.Module) else None
        parameters = [] if self.module is None else list(self.module.parameters())
        if any(parameter.is_meta for parameter in parameters):
            raise ModelError("weights of the model are on the device meta, where they have no values: load them first")
        parameter = next(iter(parameters), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        self.vocab_size = self._declared("vocab_size", int)
        self.context_length = self._declared("context_length", int)
        self._width: int | None = None  # of its logits
        self.rewinds = bool(getattr(model, "rewinds", False))
        try:
            signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
            self.takes_positions = "positions" in signature.parameters
        except (TypeError, ValueError):  # a callable from C has no signature
            self.takes_positions = False

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        return self.call(ids, cache)

    @torch.no_grad()
    def call(self, ids: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        """Call the model with more arguments. Raises ModelError if it fails or does not return logits and a cache."""
        try:
            result = self.model(ids.clone(), *arguments, **options)  # it may write into what it gets
        except KvgenError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ModelError(f"the model failed with {_describe(error)}") from error
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ModelError(f"the model returned {type(result).__name__}; the contract is: logits, cache = model(...)")
        logits, cache = result
        if not (isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[0] == ids.shape[0]):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
            raise ModelError(f"the model returned logits of {found}; it must be a tensor (batch, positions, vocab)")
        if not logits.is_floating_point() or logits.is_meta:
            found = f"{logits.dtype} on {logits.device}".removeprefix("torch.")
            raise ModelError(f"the model returned logits of {found}; they must be floating-point numbers in memory")
        self._width = self._width or logits.shape[-1]
        if self._width != logits.shape[-1]:
            raise ModelError(f"the model returned logits for {logits.shape[-1]} tokens, and for {self._width} before")
        return logits.detach().clone(), cache  # the model may write its next logits into the same memory

    def declared(self, name: str) -> str | None:
        """Return a reason that the model declares in an attribute, or None. Raises UsageError for other types."""
        value: str | None = self._declared(name, str)
        return value

    @property
    def changes_at(self) -> tuple[int, ...] | None:
        """Lengths that the model declares. Raises UsageError for other types."""
        value = getattr(self.model, "changes_at", None)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise UsageError(f"the model's attribute changes_at is {value!r:.80}; it must be a list of lengths")
        lengths = tuple(value)
        if not all(type(length) is int and length > 0 for length in lengths):
            raise UsageError(f"the model's attribute changes_at is {value!r:.80}; lengths must be positive integers")
        return lengths

    def _declared(self, name: str, kind: type) -> Any:
        value = getattr(self.model, name, None)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        raise UsageError(f"the model's attribute {name} is {value!r:.80}; it must be of type {kind.__name__}")

    def count_vocabulary(self) -> int:
        """Call the model once and return the width of its logits, for models without `vocab_size`."""
        logits, _ = self(torch.zeros(1, 1, dtype=torch.int64, device=self.device), None)
        return logits.shape[-1]


def load_python(reference: str) -> PythonBackend:
    """Run `path/to/file.py:factory` and wrap the callable that the factory returns. This executes the file.

    Raises UsageError if the file has no such function or it does not return a callable, UnsupportedError if the file
    fails.
    """
    file, _, factory_name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--model {reference}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"kvgen_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--model {reference}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # like `python file.py`, so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            raise UsageError(f"--model {reference}: {file} has no function {factory_name!r}")
        model = factory()
    except KvgenError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UnsupportedError(
            f"--model {reference}: {_describe(error)}; use kvgen --traceback to see where it comes from"
        ) from error
    if not callable(model):
        raise UsageError(f"--model {reference}: {factory_name}() returned {type(model).__name__}, not a callable")
    return PythonBackend(model)


def _describe(error: BaseException) -> str:
    """Describe an error with the last line of the user's code, not of an installed library, that led to it."""
    if isinstance(error, SyntaxError):  # its line is not in the traceback
        place = f"{Path(error.filename or '').name}, line {error.lineno}"
        return f"{type(error).__name__}: {error.msg} ({place})"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
