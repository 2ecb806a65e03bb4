"""FP8 (e4m3, arXiv:2209.05433) with a scale for each block of a matrix, as DeepSeek-V3 stores it (arXiv:2412.19437,
section 3.3), or for the whole. Activations are computed as they are, not rounded to FP8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kvgen.checkpoint.quantization.integers import FP8, SCALE_TYPES
from kvgen.checkpoint.quantization.settings import Settings
from kvgen.checkpoint.raw import RawTensor, refuse_tensor
from kvgen.errors import CheckpointError

_SCALES = ("_scale_inv", "_scale")  # both multiply
_ACTIVATION_SCALES = (".activation_scale", ".input_scale")
_Block = tuple[int, int]


def dequantize(numbers: Tensor, scales: Tensor, block: _Block | None) -> Tensor:
    """Return numbers * scales, (..., R, K) fp32.

    numbers: (..., R, K) fp8. scales: for blocks of (r, k), (..., ceil(R / r), ceil(K / k)): the last blocks may be
    smaller; for None, one number.
    """
    result, scales = numbers.float(), scales.float()
    if block is None:
        return result.mul_(scales)
    columns = result.shape[-1]
    scales = scales.repeat_interleave(min(block[1], columns), dim=-1)[..., :columns]  # (..., ceil(R / r), K)
    for i, row in enumerate(scales.unbind(-2)):
        result[..., i * block[0] : (i + 1) * block[0], :] *= row[..., None, :]
    return result


def read(settings: Settings, tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Multiply each FP8 tensor X, (..., R, K), by its scales, X_scale_inv or X_scale; the other tensors are plain.

    Raises CheckpointError for scales that are missing, do not fit, or have no such tensor.
    """
    settings.choice("fmt", ("e4m3",), "e4m3")
    static = settings.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    block, folder = _read_block(settings), settings.path.parent
    result = {name: tensor for name, tensor in tensors.items() if not (static and name.endswith(_ACTIVATION_SCALES))}
    for name in [name for name, tensor in result.items() if tensor.type == FP8]:
        found = [name + ending for ending in _SCALES if name + ending in result]
        if len(found) != 1:
            refuse_tensor(folder, name + _SCALES[0], "is missing" if not found else f"is stored beside {found[1]}")
        result[name] = _scaled(folder, name, result[name], found[0], result.pop(found[0]), block)
    for name in result:
        if name.endswith(tuple(f".weight{ending}" for ending in _SCALES)):
            refuse_tensor(folder, name, f"scales a tensor that is not of the type {FP8}")
    return result


def _read_block(settings: Settings) -> _Block | None:
    size = settings.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise CheckpointError(f"{settings.shown('weight_block_size')} is {size!r:.80}; it must be two numbers above 0")
    return size[0], size[1]


def _scaled(
    folder: Path, name: str, numbers: RawTensor, scale_name: str, scales: RawTensor, block: _Block | None
) -> RawTensor:
    if len(numbers.shape) < 2 or 0 in numbers.shape:
        refuse_tensor(folder, name, f"has the shape {numbers.shape}; it must be a matrix")
    if scales.type not in SCALE_TYPES:
        refuse_tensor(folder, scale_name, f"has the type {scales.type}, not {' or '.join(SCALE_TYPES)}")
    *outer, rows, columns = numbers.shape
    shapes = [(), (1,)] if block is None else [(*outer, -(-rows // block[0]), -(-columns // block[1]))]
    if scales.shape not in shapes:
        refuse_tensor(folder, scale_name, f"has the shape {scales.shape}, not {' or '.join(map(str, shapes))}")

    def read_tensor() -> Tensor:
        return dequantize(numbers.read(), scales.read(), block)

    def release() -> None:
        numbers.release()
        scales.release()

    kind = "FP8" if block is None else f"FP8 in blocks of {block[0]} x {block[1]}"
    return RawTensor(numbers.shape, kind, numbers.nbytes + scales.nbytes, read_tensor, release, expands=True)
