"""Quantized matrices of Hugging Face folders, which several tensors store, as one tensor `X.weight` each.

A module for each `quant_method` of config.json. What is stored decides how a matrix is read, and must fit the config:
matrices that the method leaves out are stored as plain `X.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvgen.checkpoint.quantization import awq, compressed_tensors, fp8, gptq, mxfp4
from kvgen.checkpoint.quantization.settings import Settings
from kvgen.checkpoint.raw import RawTensor

Tensors = Mapping[str, RawTensor]

METHODS: dict[str, Callable[[Settings, Tensors], Tensors]] = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "mxfp4": mxfp4.read,
}


def read_quantized(path: Path, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Return the tensors under the names that the unquantized model has; unchanged if nothing is quantized.

    path: of config.json. Raises UnsupportedError for other methods and variants, CheckpointError for tensors that do
    not fit.
    """
    if config.get("quantization_config") is None:
        return tensors
    settings = Settings(config, path).section("quantization_config")
    return METHODS[settings.choice("quant_method", tuple(METHODS))](settings, tensors)
