"""A reference to a checkpoint in, a model that is ready to call out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvgen.backends.compute import ComputeOptions
from kvgen.backends.native import load_native
from kvgen.backends.python import load_python
from kvgen.backends.xtransformers import load_xtransformers
from kvgen.checkpoint import RawCheckpoint, RawTensor, read_checkpoint
from kvgen.checkpoint.digest import SourceFile
from kvgen.contract import Backend
from kvgen.errors import UnsupportedError, UsageError
from kvgen.families import runs_natively
from kvgen.hub.catalogue import Progress
from kvgen.hub.names import default_reference, no_progress, resolve
from kvgen.kernels.build import library
from kvgen.system import available_memory
from kvgen.tokenizer import Tokenizer, choose_tokenizer, read_tokenizer

BACKENDS = ("auto", "native", "library", "x-transformers")
KERNELS = ("auto", "on", "off")
QUANTIZE = ("auto", "none", "int8", "int4")
KV_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    model: the contract, ready to call: `logits, cache = loaded.model(ids, None)` with ids on `loaded.model.device`.
    source: the file or folder that it was read from, or the reference of a model in Python.
    config: what the model is made of: a DecoderConfig for the native decoder, the library's arguments for
        x-transformers, None for a model in Python.
    files: what config and weights were read from; none for a model in Python.
    cache_budget: bytes that caches may take together unless said otherwise: half of the memory that is left beside the
        weights. None for no bound.
    """

    model: Backend
    tokenizer: Tokenizer
    source: str
    config: Any = None
    files: tuple[SourceFile, ...] = ()
    cache_budget: int | None = None


def load(
    reference: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    tokenizer: str | Path | None = None,
    backend: str = "auto",
    kernels: str = "auto",
    quantize: str = "auto",
    kv_dtype: str = "auto",
    progress: Progress = no_progress,
) -> Loaded:
    """Load a checkpoint and its tokenizer.

    reference: a .gguf file, a Hugging Face or x-transformers folder, a name of the catalogue, or a hub id
        `owner/name`; None for $KVGEN_MODEL or the default model. Names and ids may download, unless $KVGEN_OFFLINE is
        set. Or `path/to/file.py:factory`, which RUNS that file: `factory()` returns a model with the contract's
        signature.
    dtype: of the weights and of the computation. `auto` is float32 on a CPU, and on a GPU the checkpoint's own
        type (bfloat16 for quantized ones). A model in Python has its own.
    device: `auto` is CUDA where there is one, else MPS, else the CPU. A model in Python has its own.
    tokenizer: None for the checkpoint's own; else a tokenizer.json, `bytes` (id = byte), or `ids` (the text is
        token ids, as in "5 17 3").
    backend: `native` is kvgen's decoder, `x-transformers` that library, for checkpoints of its format. `library` is the
        one that a checkpoint was written for, if kvgen can use it, else `native`. `auto` is `native` wherever that has
        all mechanisms, else the library.
    kernels: `on` computes with kernels in C++, which are built once for this machine; `off` with torch's operations;
        `auto` with the kernels where they can be: on a CPU, in float32, with g++. `Backend.engine` says
        which. With the kernels weights stay in the types that they are stored in.
    quantize: `auto` leaves weights as they are stored. `int8` and `int4` round floating-point ones, which is LOSSY;
        `none` makes floats of integers.
    kv_dtype: of cached keys and values; `auto` is that of the computation. `bfloat16` and `int8` are LOSSY.
    progress: told about a download; see `kvgen.hub.catalogue`.

    Raises NotFoundError, CheckpointError, UnsupportedError, UsageError.
    """
    name = str(reference or default_reference())
    if re.search(r"\.py:\w+$", name):
        return _load_from_python(name, tokenizer)
    if name.endswith(".py"):
        raise UsageError(f"model {name!r}: name the function in it that returns the model, as in {name}:make")
    chosen_device, available = _device(device), available_memory()
    raw = read_checkpoint(resolve(name, progress=progress))
    arithmetic = _arithmetic(_dtype(dtype, chosen_device, raw), chosen_device, kernels, quantize)
    if kv_dtype != "auto":
        if kv_dtype not in KV_DTYPES:
            raise UsageError(f"kv_dtype {kv_dtype!r} is not one of auto, {', '.join(KV_DTYPES)}")
        arithmetic = replace(arithmetic, kv_dtype=KV_DTYPES[kv_dtype])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the vocabulary is read while the weights are
        own_tokenizer = pool.submit(read_tokenizer, raw) if tokenizer is None else None
        model: Backend
        config: Any
        if _runs_in_library(raw, backend):
            if kernels == "on" or quantize != "auto" or kv_dtype != "auto":
                raise UsageError(
                    f"{raw.path} runs in its library: kernels, quantize and kv_dtype are for kvgen's decoder"
                )
            model, config = load_xtransformers(raw, arithmetic.dtype, arithmetic.device), raw.metadata
        else:
            model = native = load_native(raw, arithmetic, pool)
            config = native.decoder.config
        chosen = own_tokenizer.result() if own_tokenizer else choose_tokenizer(str(tokenizer), model.vocab_size or 0)
    return Loaded(model, chosen, str(raw.path), config, raw.files, _cache_budget(model, available))


def _runs_in_library(raw: RawCheckpoint, backend: str) -> bool:
    """Whether the x-transformers library is to run a checkpoint, not kvgen's decoder."""
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if raw.format != "x-transformers":
        if backend == "x-transformers":
            raise UsageError(f"{raw.path}: only checkpoints of x-transformers run in it; see `kvgen convert`")
        return False
    return backend in ("library", "x-transformers") or (backend == "auto" and not runs_natively(raw))


def _load_from_python(reference: str, tokenizer: str | Path | None) -> Loaded:
    if tokenizer is None:
        raise UsageError(f"model {reference!r} has no tokenizer: give --tokenizer FILE, or --ids for plain token ids")
    available = available_memory()
    model = load_python(reference)
    chosen = choose_tokenizer(str(tokenizer), model.vocab_size or model.count_vocabulary())
    return Loaded(model, chosen, reference, cache_budget=_cache_budget(model, available))


def _cache_budget(model: Backend, available: int) -> int:
    """See `Loaded`. available: memory before the model was loaded, for weights may be mapped and not yet read."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return int(free) // 2
    return max(0, available - (model.weight_bytes or 0)) // 2


def _arithmetic(dtype: torch.dtype, device: torch.device, kernels: str, quantize: str) -> ComputeOptions:
    """How to compute, and on which kernels. Raises UsageError, and UnsupportedError for kernels that cannot be."""
    if kernels not in KERNELS:
        raise UsageError(f"kernels {kernels!r} is not one of {', '.join(KERNELS)}")
    if quantize not in QUANTIZE:
        raise UsageError(f"quantize {quantize!r} is not one of {', '.join(QUANTIZE)}")
    fits = device.type == "cpu" and dtype == torch.float32
    if kernels == "on" and not fits:
        raise UsageError(f"the kernels compute in float32 on a CPU, not in {str(dtype)[6:]} on {device}")
    if kernels == "off" or not fits:
        return ComputeOptions(dtype, device, quantize=quantize)
    try:
        library()
    except UnsupportedError as error:
        if kernels == "on":
            raise
        return ComputeOptions(dtype, device, quantize=quantize, engine=f"torch ({error})")
    return ComputeOptions(dtype, device, kernels=True, quantize=quantize, engine="C++ kernels")


def _usable_devices() -> list[str]:
    """The best one first."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, here in present.items() if here]


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device(_usable_devices()[0])
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # fails on `meta`, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = ", ".join(("auto", *_usable_devices()))
        raise UsageError(f"device {str(device)!r} cannot be used on this machine; it has {usable}") from None
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device, raw: RawCheckpoint) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return torch.float32 if device.type == "cpu" else _stored_dtype(raw.tensors.values())


def _stored_dtype(tensors: Iterable[RawTensor]) -> torch.dtype:
    """The dtype that most weights are stored in; bfloat16 for quantized ones."""
    types = [tensor.type for tensor in tensors if len(tensor.shape) > 1]
    most = max(set(types), key=types.count, default="F32")
    return {"F32": torch.float32, "F16": torch.float16}.get(most, torch.bfloat16)
