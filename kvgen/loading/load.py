"""Load a checkpoint and its tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvgen.backends.adapter import read_adapter
from kvgen.backends.compute import ComputeOptions
from kvgen.backends.native import load_native
from kvgen.backends.python import load_python
from kvgen.backends.xtransformers import load_xtransformers
from kvgen.checkpoint import RawCheckpoint, read_checkpoint
from kvgen.checkpoint.digest import SourceFile
from kvgen.contract import Backend
from kvgen.errors import UnsupportedError, UsageError
from kvgen.hub.catalogue import Progress
from kvgen.hub.names import default_reference, no_progress, resolve
from kvgen.kernels.build import available_variant, library
from kvgen.kernels.processors import NATIVE, asked_variant
from kvgen.system import available_memory, return_freed_memory
from kvgen.tokenizer import Tokenizer, choose_tokenizer, read_tokenizer

KV_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
ACTIVATIONS = {"int16": 16, "int8": 8}
CHOICES = {  # the defaults first
    "kernels": ("auto", "cpp", "off"),
    "quantize": ("auto", "none", "int8", "int4"),
    "kv_dtype": tuple(KV_DTYPES),
    "activations": tuple(ACTIVATIONS),
}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer in memory.

        >>> loaded.tokenizer.encode("Hello"), loaded.model.context_length
        ([19556], 8192)

    model: the contract: `logits, cache = loaded.model(ids, None)`, with ids on `loaded.model.ids_device`.
    source: the file or folder, or the reference of a model in Python. adapter: the adapter's folder; "" without one.
    config: a DecoderConfig for kvgen's decoder, the library's arguments for x-transformers, None for a model in Python.
    files: the files of config and weights, those of the adapter too; empty for a model in Python.
    cache_budget: bytes for all caches together by default: half of the memory that the weights leave. None: no limit.
    note: what to tell the user, such as that images are left out; "" for nothing.
    """

    model: Backend
    tokenizer: Tokenizer
    source: str
    config: Any = None
    files: tuple[SourceFile, ...] = ()
    cache_budget: int | None = None
    note: str = ""
    adapter: str = ""


def load(
    reference: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    kernels: str = "auto",
    quantize: str = "auto",
    kv_dtype: str = "auto",
    activations: str = "int16",
    progress: Progress = no_progress,
) -> Loaded:
    """Load a checkpoint and its tokenizer.

        >>> kvgen.load("smollm2", kernels="off").model.dtype
        torch.float32

    reference: a .gguf file, a Hugging Face or x-transformers folder, a name in the catalogue or a hub id `owner/name`
        (both may download, unless $KVGEN_OFFLINE is set), or `path/to/file.py:factory`, which RUNS that file:
        `factory()` returns a model with the contract's signature. None: $KVGEN_MODEL or the default model.
    dtype: of the weights and the computation. `auto`: float32 on a CPU; on a GPU the checkpoint's own, or bfloat16 for
        quantized weights. Ignored for a model in Python.
    device: `auto`: CUDA, else MPS, else the CPU. Ignored for a model in Python.
    tokenizer: a tokenizer.json, `bytes` (id = byte), or `ids` (text is token ids, as in "5 17 3"). None: the
        checkpoint's own.
    adapter: a folder with a LoRA adapter of PEFT, which is merged into the weights.
    kernels: `cpp`: C++ kernels, which keep weights in their stored types; `off`: torch; `auto`: kernels on a CPU in
        float32, if they have the model's mechanisms and are prebuilt or a compiler is found, else torch; on an NVIDIA
        GPU, Triton kernels for steps of one sequence, if they have them.
        `Backend.engine` tells which. $KVGEN_CPU chooses the kernels' instructions.
    quantize: `auto`: weights as stored; `int8`, `int4`: quantize floating-point weights, LOSSY; `none`: dequantize.
    kv_dtype: of cached keys and values; `auto`: that of the computation; `bfloat16`, `int8`: LOSSY.
    activations: integers to which the kernels round activations where weights are integers; `int8`: faster, LOSSY.
    progress: called during a download; see `kvgen.hub.catalogue`.

    Raises NotFoundError, CheckpointError, UnsupportedError, UsageError.
    """
    chosen = {"kernels": kernels, "quantize": quantize, "kv_dtype": kv_dtype, "activations": activations}
    for option, value in chosen.items():
        _check_choice(option, value, CHOICES[option])
    name = str(reference or default_reference())
    if re.search(r"\.py:\w+$", name):
        if adapter is not None:
            raise UsageError(f"model {name!r} is a program, which takes no adapter")
        _check_defaults(f"model {name!r} is a program", chosen)
        return _load_python(name, tokenizer)
    if name.endswith(".py"):
        raise UsageError(f"model {name!r}: name the function in it that returns the model, as in {name}:factory")
    device = choose_device(device)
    return _load_checkpoint(resolve(name, progress=progress), dtype, device, tokenizer, adapter, chosen)


def _load_checkpoint(
    path: Path,
    dtype: str | torch.dtype,
    device: torch.device,
    tokenizer: str | Path | None,
    adapter: str | Path | None,
    chosen: Mapping[str, str],
) -> Loaded:
    raw = read_checkpoint(path)
    dtype = _choose_dtype(dtype, device, raw)
    if raw.format == "x-transformers":
        _check_defaults(f"{raw.path} runs in the x-transformers library", chosen)
        options = ComputeOptions(dtype, device)
    else:
        options = _compute_options(dtype, device, **chosen)
    available = available_memory()
    changes = None if adapter is None else read_adapter(adapter)
    if changes is not None and raw.format == "x-transformers":
        raise UsageError(f"{raw.path} runs in the x-transformers library, which takes no adapter")
    model: Backend
    config: Any
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        own_tokenizer = pool.submit(read_tokenizer, raw) if tokenizer is None else None
        if own_tokenizer is not None:  # before the weights are in memory: a large vocabulary takes 100 MB meanwhile
            wait([own_tokenizer])
        raw = raw.without_vocabulary()
        return_freed_memory()
        if raw.format == "x-transformers":
            model, config = load_xtransformers(raw, options.dtype, options.device), raw.metadata
        else:
            model = native = load_native(raw, options, pool, changes)
            config = native.decoder.config
        used = own_tokenizer.result() if own_tokenizer else choose_tokenizer(str(tokenizer), model.vocab_size or 0)
    files = raw.files if changes is None else raw.files + changes.files
    budget = _cache_budget(model, available)
    return Loaded(model, used, str(raw.path), config, files, budget, raw.note, str(adapter or ""))


def _load_python(reference: str, tokenizer: str | Path | None) -> Loaded:
    if tokenizer is None:
        raise UsageError(f"model {reference!r} has no tokenizer: give --tokenizer FILE, or --ids for plain token ids")
    available = available_memory()
    model = load_python(reference)
    chosen = choose_tokenizer(str(tokenizer), model.vocab_size or model.count_vocabulary())
    return Loaded(model, chosen, reference, cache_budget=_cache_budget(model, available))


def _cache_budget(model: Backend, available: int) -> int:
    """See `Loaded`. available: memory before loading, since mapped weights may not be in memory yet."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return int(free) // 2
    return max(0, available - (model.weight_bytes or 0)) // 2


def _compute_options(
    dtype: torch.dtype, device: torch.device, kernels: str, quantize: str, kv_dtype: str, activations: str
) -> ComputeOptions:
    """Raises UsageError for options that exclude each other, UnsupportedError if kernels are required and missing."""
    required = kernels == "cpp" or activations != "int16"
    fits = device.type == "cpu" and dtype == torch.float32
    if required and kernels == "off":
        raise UsageError(f"only the kernels have {activations} activations; they are off")
    if required and not fits:
        raise UsageError(f"the kernels compute in float32 on a CPU, not in {str(dtype)[6:]} on {device}")
    engine, use_kernels = "torch", kernels != "off" and fits
    if use_kernels:
        try:
            library()
            engine = available_variant().engine
            engine += f", {activations} activations" * (activations != "int16")
        except UnsupportedError as error:
            if required or asked_variant() != NATIVE:
                raise
            engine, use_kernels = f"torch ({error})", False
    return ComputeOptions(
        *(dtype, device, use_kernels, quantize, KV_DTYPES[kv_dtype], ACTIVATIONS[activations], engine, required),
        step_kernels=kernels != "off" and device.type == "cuda",
    )


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {value!r} is not one of {', '.join(choices)}")


def _check_defaults(what: str, chosen: Mapping[str, str]) -> None:
    """Refuse options that only kvgen's own decoders have."""
    for name, value in chosen.items():
        if value not in (CHOICES[name][0], "off"):
            raise UsageError(f"{what}, for which {name} {value!r} cannot be chosen")


def choose_device(device: str | torch.device) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [name for name, is_available in available.items() if is_available]
    try:
        chosen = torch.device(usable[0] if device == "auto" else device)
        torch.empty(1, device=chosen).item()  # fails on `meta`, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"device {str(device)!r} cannot be used on this machine; it has {', '.join(('auto', *usable))}"
        ) from None
    return chosen


def _choose_dtype(dtype: str | torch.dtype, device: torch.device, raw: RawCheckpoint) -> torch.dtype:
    """With `auto` on a GPU, the dtype that most weights are stored in; bfloat16 for quantized ones."""
    if isinstance(dtype, torch.dtype):
        return dtype
    _check_choice("dtype", dtype, ("auto", *DTYPES))
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    types = [tensor.type for tensor in raw.tensors.values() if len(tensor.shape) > 1]
    most_common = max(set(types), key=types.count, default="F32")
    return {"F32": torch.float32, "F16": torch.float16}.get(most_common, torch.bfloat16)
