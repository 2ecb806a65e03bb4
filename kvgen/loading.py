"""A reference to a checkpoint in, a model that is ready to call out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvgen.catalogue import Progress
from kvgen.checkpoint import RawCheckpoint, RawTensor, read_checkpoint
from kvgen.errors import CheckpointError, UsageError
from kvgen.families import Family, find_family
from kvgen.families.family import block_part, parameter_names
from kvgen.hub import no_progress, resolve
from kvgen.model.config import DecoderConfig
from kvgen.model.decoder import Decoder
from kvgen.tokenizer import Tokenizer, read_tokenizer

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    model: the contract, ready to call: `logits, cache = loaded.model(ids, None)` with ids on `device`.
    path: the file or folder that it was read from.
    """

    model: Decoder
    tokenizer: Tokenizer
    config: DecoderConfig
    path: Path
    device: torch.device
    dtype: torch.dtype


def load(
    reference: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    progress: Progress = no_progress,
) -> Loaded:
    """Load a checkpoint and its tokenizer.

    reference: a .gguf file, a Hugging Face folder, a name of the catalogue, or a hub id `owner/name`; None for
        $KVGEN_MODEL or the default model. The last two may download, unless $KVGEN_OFFLINE is set.
    dtype: of the weights and of the computation. `auto` is float32 on a CPU, and on a GPU the checkpoint's own
        type (bfloat16 for quantized ones).
    device: `auto` is CUDA where there is one, else MPS, else the CPU.
    progress: told about a download; see `kvgen.hub`.

    Raises NotFoundError, CheckpointError, UnsupportedError, UsageError.
    """
    chosen_device = _device(device)
    raw = read_checkpoint(resolve(reference, progress=progress))
    family = find_family(raw)
    config = family.config(raw)
    chosen_dtype = _dtype(dtype, chosen_device, raw)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the vocabulary is read while the weights are
        tokenizer = pool.submit(read_tokenizer, raw)
        model = _build_decoder(raw, family, config, chosen_dtype, chosen_device, pool)
        return Loaded(model, tokenizer.result(), config, raw.path, chosen_device, chosen_dtype)


def _build_decoder(
    raw: RawCheckpoint,
    family: Family,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    pool: ThreadPoolExecutor,
) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    found, unknown = parameter_names(raw.tensors, family.names(raw))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _check_names(raw.path, missing=shapes.keys() - found.keys(), unknown=unknown)
    _check_names(raw.path, missing=[], unknown=[found[name] for name in found.keys() - shapes.keys()])
    for name, shape in shapes.items():
        actual = raw.tensors[found[name]].shape
        if actual != shape:
            raise CheckpointError(f"{raw.path}: tensor {found[name]!r} has the shape {actual}, not {shape}")
    transforms = family.transforms(raw, config)

    def read(name: str) -> tuple[str, Tensor]:
        tensor = raw.tensors[found[name]].read()
        transform = transforms.get(block_part(name))
        return name, (transform(tensor) if transform else tensor).to(device=device, dtype=dtype)

    model.load_state_dict(dict(pool.map(read, shapes)), strict=True, assign=True)
    model.requires_grad_(False)
    return model.to(device)


def _check_names(path: Path, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    for what, names in (
        ("is missing", sorted(missing)),
        ("is not part of this kind of model", sorted(unknown)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: the tensor {names[0]!r}{more} {what}")


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"device {str(device)!r} cannot be used on this machine; try auto, cpu, cuda or mps") from None
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
