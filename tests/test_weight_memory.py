"""Weights lie next to each other on huge pages, and give them back."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import kvgen
from kvgen.backends.native import NativeBackend
from kvgen.kernels.decoder import KernelDecoder
from kvgen.kernels.memory import WeightMemory
from kvgen.kernels.packed import PackedMatrix

linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")


def flags_at(address: int) -> list[str] | None:
    """The flags of the mapping at an address, see `VmFlags` in https://docs.kernel.org/filesystems/proc.html."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return rest
    return None


def test_tensors_share_no_memory() -> None:
    memory = WeightMemory()
    shapes = [(3, 5), (0, 4), (1 << 20,), (7,), (1 << 27,), (2, 2)]  # one is larger than a mapping
    tensors = [memory.empty(shape, dtype) for shape in shapes for dtype in (torch.int8, torch.float16)]
    assert [tuple(tensor.shape) for tensor in tensors] == [shape for shape in shapes for _ in range(2)]
    ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert all(start % 64 == 0 for start, _ in ends)


@linux
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
def test_weights_lie_on_huge_pages(smollm2_path: Path) -> None:
    model = kvgen.load(smollm2_path, kernels="cpp").model
    assert isinstance(model, NativeBackend)
    assert isinstance(model.decoder, KernelDecoder)
    matrices = [weight for weight in model.decoder.weights.values() if isinstance(weight, PackedMatrix)]
    addresses = sorted((t.data_ptr(), t.nbytes) for matrix in matrices for t in matrix.tensors)
    for address, _ in (addresses[0], addresses[-1]):
        flags = flags_at(address)
        assert flags is not None and "hg" in flags
    whole = addresses[-1][0] + addresses[-1][1] - addresses[0][0]
    assert whole < sum(nbytes for _, nbytes in addresses) * 1.01


@linux
def test_memory_is_freed_with_its_last_tensor() -> None:
    memory = WeightMemory()
    tensors = [memory.empty((100,), torch.float32) for _ in range(2)]
    address = tensors[0].data_ptr()
    del memory, tensors[0]
    flags = flags_at(address)
    assert flags is not None
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    tensors.clear()
    flags = flags_at(address)
    assert flags is None or "hg" not in flags
