"""Products with integer weights: exact sums of rounded activations; and whole models with activations of 8 bits."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvgen
from kvgen.backends.native import NativeBackend
from kvgen.checkpoint.grouped import Grouped
from kvgen.kernels import structs
from kvgen.kernels.build import library
from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.structs import OpKind
from tests.families import make_checkpoint
from tests.sizes import examples

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def drawn_matrix(kind: str, rows: int, groups: int) -> Grouped:
    bits, group = int(kind[0]), 16 if "groups of 16" in kind else 32
    if bits == 8:
        codes = torch.randint(-128, 128, (rows, groups * group), dtype=torch.int8)
    else:
        codes = torch.randint(0, 256, (rows, groups * group // 2), dtype=torch.uint8)
    scales = torch.rand(rows, groups).half() if "fp16" in kind else torch.rand(rows, groups)
    mins = -scales * 3 if "minimums" in kind else None
    return Grouped(codes, scales, mins, group, TABLE if "table" in kind else None)


def product(matrix: PackedMatrix, x: Tensor, bits: int) -> Tensor:
    """Run one LINEAR operation: (n, K) to (n, R)."""
    out = torch.empty(len(x), matrix.shape[0])
    op = structs.Op(kind=OpKind.LINEAR, src=0, dst=1, other=-1, third=-1, scale=1, weight=ctypes.pointer(matrix.weight))
    slots, widths = (ctypes.c_void_p * 2)(x.data_ptr(), out.data_ptr()), (ctypes.c_int32 * 2)(*matrix.shape[::-1])
    run = structs.Run(ctypes.pointer(op), slots, widths, count=1, rows=len(x), activation_bits=bits)
    library().kvgen_run(ctypes.byref(run), 2)
    return out


def rounded(x: Tensor, group: int, bits: int) -> Tensor:
    """What the kernels make of activations, (n, K), in fp64."""
    limit = 2 ** (bits - 1) - 1
    groups = x.view(len(x), -1, group)
    largest = groups.abs().amax(-1, keepdim=True)
    whole = (groups * torch.where(largest > 0, torch.tensor(float(limit)) / largest, 0)).round()
    return (whole.double() * (largest / limit).double()).view(x.shape)


KINDS = ["4 bits, minimums", "4 bits, fp16, minimums", "4 bits, groups of 16", "8 bits", "8 bits, fp16"]
KINDS += ["8 bits, groups of 16, minimums", "4 bits, table"]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_integer_products_are_exact(kind: str, bits: int) -> None:
    matrix = drawn_matrix(kind, 70, 6)
    weights, packed = matrix.dequantized().double(), PackedMatrix(matrix)
    for count in (1, 2, 3, 5, 11, 12, 13, 29):
        x = torch.randn(count, weights.shape[1]) * torch.rand(count, 1) * 5
        x[0, :32] = 0
        expected = rounded(x, matrix.group, bits) @ weights.T
        size = rounded(x, matrix.group, bits).abs() @ weights.abs().T
        # fp32 rounds a few times in each of the 6 or 12 groups.
        assert ((product(packed, x, bits) - expected).abs() <= 3e-7 * size).all()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeBackend]:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", 0, folder)
    found = {}
    for bits in ("int4", "int8"):
        model = kvgen.load(folder, tokenizer="ids", quantize=bits, activations="int8").model
        assert isinstance(model, NativeBackend)
        found[bits] = model
    return found


@given(data=st.data(), bits=st.sampled_from(["int4", "int8"]))
@settings(max_examples=examples(30))
def test_any_way_to_split_a_text_gives_the_same_bits(models: dict[str, NativeBackend], data, bits: str) -> None:
    model = models[bits]
    ids = torch.tensor([data.draw(st.lists(st.integers(2, 95), min_size=1, max_size=150))])
    expected, cache = model.all_logits(ids)[0], None
    for end in sorted(data.draw(st.sets(st.integers(1, ids.shape[1]), min_size=1, max_size=6))):
        logits, cache = model(ids[:, :end], cache)
        assert torch.equal(logits[0, -1], expected[end - 1])


def test_rows_of_a_batch_have_the_bits_of_each_alone(models: dict[str, NativeBackend]) -> None:
    ids = torch.randint(2, 96, (3, 80))
    for model in models.values():
        assert torch.equal(model.all_logits(ids), torch.cat([model.all_logits(row[None]) for row in ids]))


def test_eight_bits_round_more_than_sixteen(tmp_path: Path, models: dict[str, NativeBackend]) -> None:
    make_checkpoint("llama", 0, tmp_path)
    loaded = kvgen.load(tmp_path, tokenizer="ids", quantize="int8", kernels="cpp")
    ids = torch.randint(2, 96, (1, 60))
    distance = (loaded.model.all_logits(ids) - models["int8"].all_logits(ids)).abs().max()
    assert 1e-5 < distance < 0.5
    assert "int8 activations" in models["int8"].engine
    assert models["int8"].numerics != loaded.model.numerics


def test_torch_has_no_integer_activations(tmp_path: Path) -> None:
    make_checkpoint("llama", 0, tmp_path)
    with pytest.raises(kvgen.UsageError, match="only the kernels have int8 activations"):
        kvgen.load(tmp_path, tokenizer="ids", activations="int8", kernels="off")
    with pytest.raises(kvgen.UsageError, match="compute in float32 on a CPU, not in bfloat16"):
        kvgen.load(tmp_path, tokenizer="ids", activations="int8", dtype="bfloat16")
    with pytest.raises(kvgen.UsageError, match="has no integer weights"):
        kvgen.load(tmp_path, tokenizer="ids", activations="int8")
    with pytest.raises(kvgen.UsageError, match="activations 'int4' is not one of int16, int8"):
        kvgen.load(tmp_path, tokenizer="ids", activations="int4")
