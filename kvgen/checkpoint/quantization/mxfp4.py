"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 numbers of 4 bits (e2m1) with a common exponent (e8m0)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kvgen.checkpoint.grouped import E2M1_DOUBLED, Grouped, powers_of_two
from kvgen.checkpoint.quantization.settings import Settings
from kvgen.checkpoint.raw import RawTensor, refuse_tensor

_BLOCK_BYTES = 16
_CHUNK = 1 << 14  # blocks that are converted at a time, so that temporary tensors fit into the CPU cache
_DOUBLED = torch.tensor(E2M1_DOUBLED, dtype=torch.bfloat16)
_SCALES = (2.0 ** torch.arange(-128, 128, dtype=torch.float64)).bfloat16()  # half of 2^(e - 127), of doubled numbers


def dequantize(blocks: Tensor, exponents: Tensor, *, halves: bool) -> Tensor:
    """Return the numbers of blocks, (N, 32) bf16, which has each of them exactly.

    blocks: (N, 16) uint8, two numbers a byte: numbers 2i and 2i + 1 in the low and high half of byte i; if `halves`,
    numbers i and 16 + i, as in ggml. exponents: (N,) uint8.
    """
    numbers = torch.empty(len(blocks), 2 * _BLOCK_BYTES, dtype=torch.bfloat16)
    for start in range(0, len(blocks), _CHUNK):
        part = slice(start, start + _CHUNK)
        codes = torch.stack((blocks[part] & 15, blocks[part] >> 4), dim=1 if halves else 2).flatten(1)  # (n, 32)
        torch.mul(_DOUBLED[codes.int()], _SCALES[exponents[part].int()][:, None], out=numbers[part])
    return numbers


def read(settings: Settings, tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Assemble the experts of each layer, E matrices (R, K), as X of the shape (E, K, R), as transformers has them.

    X_blocks: uint8, (E, R, K / 32, 16). X_scales: uint8, (E, R, K / 32). `modules_to_not_convert` of config.json is
    not needed: these have no such tensors.
    """
    result = dict(tensors)
    ends = ("_blocks", "_scales")
    for name in dict.fromkeys(name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)):
        result[name] = _assembled(settings.path.parent, name, result)
    return result


def _assembled(folder: Path, name: str, tensors: dict[str, RawTensor]) -> RawTensor:
    """Take both tensors of X out of `tensors`. Raises CheckpointError."""

    if name in tensors:
        refuse_tensor(folder, name, f"is stored beside its quantized form, {name}_blocks")
    for part in ("_blocks", "_scales"):
        if f"{name}{part}" not in tensors:
            refuse_tensor(folder, name + part, "is missing")
    blocks, scales = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
    for part, tensor in (("_blocks", blocks), ("_scales", scales)):
        if tensor.type != "U8":
            refuse_tensor(folder, name + part, f"has the type {tensor.type}, not U8")
    if len(blocks.shape) != 4 or blocks.shape[3] != _BLOCK_BYTES or 0 in blocks.shape:
        refuse_tensor(
            folder,
            f"{name}_blocks",
            f"has the shape {blocks.shape}; it must be (experts, rows, blocks, {_BLOCK_BYTES})",
        )
    if scales.shape != blocks.shape[:3]:
        refuse_tensor(folder, f"{name}_scales", f"has the shape {scales.shape}, not {blocks.shape[:3]}")
    experts, rows, count, _ = blocks.shape
    columns = count * 2 * _BLOCK_BYTES

    def read_tensor() -> Tensor:
        numbers = dequantize(blocks.read().view(-1, _BLOCK_BYTES), scales.read().flatten(), halves=False)
        return numbers.view(experts, rows, columns).transpose(1, 2)

    def read_grouped() -> Grouped:
        numbers = blocks.read()
        low, high = numbers & 15, numbers >> 4  # numbers 2i and 2i + 1 of a block
        codes = torch.stack((low, high), dim=-1).flatten(-2)  # (E, R, K / 32, 32)
        halves = codes[..., :_BLOCK_BYTES] | codes[..., _BLOCK_BYTES:] << 4
        powers = torch.from_numpy(powers_of_two(scales.read().numpy()))
        return Grouped(halves.flatten(-2), powers, None, 2 * _BLOCK_BYTES, E2M1_DOUBLED)

    def release() -> None:
        blocks.release()
        scales.release()

    return RawTensor(
        (experts, columns, rows),
        "MXFP4",
        blocks.nbytes + scales.nbytes,
        read_tensor,
        release,
        read_grouped,
        transposed=True,
    )
