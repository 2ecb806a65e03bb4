"""What the kernels for steps lack of a decoder, and what they need of a machine."""

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


def missing(device: torch.device) -> str | None:
    """Return what the kernels need and this machine does not have; None if nothing is missing."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _OLDEST:
        return "a GPU of compute capability {}.{} or more".format(*_OLDEST)
    if importlib.util.find_spec("triton") is None:
        return "Triton"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "a C compiler"  # Triton compiles its launchers with it
    return None


def lacking(config: DecoderConfig, dtype: torch.dtype, stored: torch.dtype | None = None) -> str | None:
    """Return the mechanisms of a decoder that the kernels lack, in words; None if they have them all.

    stored: dtype of cached keys and values; None for `dtype`, that of the computation.
    """
    return ", ".join(dict.fromkeys(_lacking(config, dtype, stored or dtype))) or None


def _lacking(config: DecoderConfig, dtype: torch.dtype, stored: torch.dtype) -> Iterator[str]:
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
        elif stored == torch.int8 and mixer.head_dim % 4:
            yield f"int8 heads of {mixer.head_dim} numbers"  # whose scales are not aligned
        if not isinstance(ffn, MLP) or not ffn.gated or ffn.activation not in ACTIVATIONS:
            yield "other layers than gated MLPs"
