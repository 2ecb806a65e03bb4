"""A model that the user brings: an object made by a function in a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.contract import Backend
from kvgen.errors import KvgenError, ModelError, UnsupportedError, UsageError


class PythonBackend(Backend):
    """Any callable with the contract's signature. It may return logits for all positions, the new ones or the last.

    The callable may say more of itself in attributes: `vocab_size`, `context_length`, and `rewinds = True` if its cache
    may be handed any sequence, not only one that continues what it has seen. For `kvgen compare`: `changes_at` (the
    lengths of its windows, for example), `lossy` or `cannot_cache` (a reason). If it takes a keyword `positions`, (n,)
    int64 for the whole sequence, the diagnosis can tell wrong positions from other faults.
    """

    name = "python"

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.module = model if isinstance(model, nn.Module) else None
        parameter = next(self.module.parameters(), None) if self.module is not None else None
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        self.vocab_size = getattr(model, "vocab_size", None)
        self.context_length = getattr(model, "context_length", None)
        self.takes_positions = "positions" in _parameters(model)
        self.rewinds = bool(getattr(model, "rewinds", False))

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        return self.call(ids, cache)

    @torch.no_grad()
    def call(self, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        """Call the model with more than the contract asks for; its result is checked as ever."""
        return _checked(arguments[0], self._run(*arguments, **options))

    def _run(self, *arguments: Any, **options: Any) -> Any:
        try:
            return self.model(*arguments, **options)
        except KvgenError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ModelError(f"the model failed with {_described(error)}") from error

    def count_vocabulary(self) -> int:
        """The width of the logits, for a model that does not say its vocab_size."""
        logits, _ = self(torch.zeros(1, 1, dtype=torch.int64, device=self.device), None)
        return logits.shape[-1]


def _described(error: Exception) -> str:
    """What the user's code raised, and where in it: not in a library that it called."""
    if isinstance(error, SyntaxError):  # its place is not that of a call
        place = f"{Path(error.filename or '').name}, line {error.lineno}"
        return f"{type(error).__name__}: {error.msg} ({place})"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


def _checked(ids: Tensor, result: Any) -> tuple[Tensor, Any]:
    """What a model returned, if it is logits and a cache. Raises ModelError."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ModelError(f"the model returned {type(result).__name__}; the contract is: logits, cache = model(...)")
    logits, cache = result
    if not (isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[0] == ids.shape[0]):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model returned logits of shape {shape}; they must be (batch, positions, vocab)")
    return logits, cache


def _parameters(model: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):  # a callable made in C has no signature to read
        return {}


def load_python(reference: str) -> PythonBackend:
    """Run `path/to/file.py:factory` and wrap what the factory returns. This executes the file.

    Raises UsageError if the file has no such function or it does not return a callable, UnsupportedError if the
    file cannot be run.
    """
    path_text, _, factory_name = reference.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UsageError(f"--model {reference}: there is no file {path_text}")
    spec = importlib.util.spec_from_file_location(f"kvgen_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--model {reference}: {path_text} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does, for the modules beside it
    try:
        spec.loader.exec_module(module)
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            raise UsageError(f"--model {reference}: {path_text} has no function {factory_name!r}")
        model = factory()
    except KvgenError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UnsupportedError(
            f"--model {reference}: {_described(error)}; kvgen --traceback shows what led there"
        ) from error
    if not callable(model):
        raise UsageError(f"--model {reference}: {factory_name}() returned {type(model).__name__}, not a model to call")
    return PythonBackend(model)
