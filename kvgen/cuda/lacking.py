"""What the kernels of steps lack: of a decoder, and of a machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch

from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP
from kvgen.model.mixers import Attention

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: the first with bf16


def lacking(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return what keeps the kernels from computing the steps of a decoder, in words; None if nothing does."""
    return ", ".join(dict.fromkeys((*_of_machine(device), *_of_decoder(config, dtype)))) or None


def _of_machine(device: torch.device) -> Iterator[str]:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _OLDEST:
        yield f"a GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]}"
    if importlib.util.find_spec("triton") is None:
        yield "Triton"
    elif shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("clang") is None:
        yield "a C compiler"  # Triton compiles its launcher with it


def _of_decoder(config: DecoderConfig, dtype: torch.dtype) -> Iterator[str]:
    if dtype not in DTYPES:
        yield str(dtype).removeprefix("torch.")
    if config.norm != "rms":
        yield "layer norms"
    if config.parallel:
        yield "parallel blocks"
    if config.layer_inputs or config.altup or config.laurel_rank or config.block_scales:
        yield "additions to blocks"
    for layer in config.layers:
        mixer, ffn = layer.mixer, layer.ffn
        if not isinstance(mixer, Attention):
            yield "layers without attention of their own"
        elif mixer.qk_norm not in (None, "head") or mixer.value_norm:
            yield "norms of queries, keys or values"
        elif mixer.keys_as_values or mixer.output_gate:
            yield "shared or gated projections"
        if not isinstance(ffn, MLP) or not ffn.gated or ffn.activation not in ACTIVATIONS:
            yield "other layers than gated MLPs"
