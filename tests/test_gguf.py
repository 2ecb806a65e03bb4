"""The GGUF reader against the gguf package's own, and against files that were damaged on purpose."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvgen import CheckpointError, KvgenError, UnsupportedError
from kvgen.checkpoint import read_checkpoint
from kvgen.checkpoint.strings import Strings
from tests.sizes import examples

QUANTIZED = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """A file with a value of every type and tensors of several."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "grüße 😀")
    writer.add_array("words", ["a", "", "bé"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("floats", [0.5, -1.25])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 4), dtype=np.float32))
    writer.add_tensor("half", rng.standard_normal((2, 3, 4)).astype(np.float16))
    values = rng.standard_normal((4, 64), dtype=np.float32)
    for kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16):
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_as_package(path: Path) -> None:
    raw = read_checkpoint(path)
    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = {key: list(value) if isinstance(value, Strings) else value for key, value in raw.metadata.items()}
    assert values == {key: field.contents() for key, field in fields.items()}
    assert raw.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        ours = raw.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.type == tensor.tensor_type.name
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.read().float(), expected.view(ours.shape))


def test_every_entry_equals_the_packages_reader(small_file: Path) -> None:
    assert_same_as_package(small_file)


@pytest.mark.slow
def test_every_entry_of_the_default_model_equals_the_packages_reader(smollm2_path: Path) -> None:
    assert_same_as_package(smollm2_path)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_quantization_type_equals_the_packages_dequantization(kind: Any, tmp_path: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = 24, 3
    data = np.random.default_rng(int(kind)).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_checkpoint(path).tensors["weight"]
    assert tensor.shape == (rows, blocks * block)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, kind)
        actual = tensor.read().float().numpy()
    np.testing.assert_array_equal(actual, expected)


def test_a_type_that_nothing_can_dequantize_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.Q8_K
    writer.add_tensor("weight", np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="Q8_K"):
        read_checkpoint(path).tensors["weight"].read()


def header(version: int = 3, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor_info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


HUGE = 2**62
HOSTILE = {
    "empty header": (b"GGUF", "bytes wanted"),
    "version 1": (header(version=1), "version 1"),
    "version 99": (header(version=99), "version 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "huge pair count": (header(pairs=HUGE), "bytes wanted"),
    "huge tensor count": (header(tensors=HUGE), "bytes wanted"),
    "huge key": (header(pairs=1, rest=struct.pack("<Q", HUGE)), "bytes wanted"),
    "unknown value type": (header(pairs=1, rest=pair("k", 77, b"")), "value type 77"),
    "huge string": (header(pairs=1, rest=pair("k", 8, struct.pack("<Q", 2**64 - 1))), "bytes wanted"),
    "huge array": (header(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 4, HUGE))), "bytes wanted"),
    "huge string array": (header(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 8, HUGE))), "does not fit"),
    "huge nested array": (header(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 9, HUGE))), "does not fit"),
    "deep array": (header(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 9, 1) * 50)), "too deeply"),
    "string past the end": (
        header(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 500) + b"abc")),
        "past the end",
    ),
    "strings with half a character": (
        header(pairs=1, rest=pair("k", 9, struct.pack("<IQQ", 8, 2, 1) + b"\xc3" + struct.pack("<Q", 1) + b"\xa9")),
        "UTF-8",
    ),
    "text that is not UTF-8": (header(pairs=1, rest=pair("k", 8, struct.pack("<Q", 2) + b"\xff\xfe")), "UTF-8"),
    "same key twice": (header(pairs=2, rest=pair("k", 7, b"\1") * 2), "'k' occurs twice"),
    "no dimensions": (header(tensors=1, rest=tensor_info("t", ())), "0 dimensions"),
    "many dimensions": (header(tensors=1, rest=tensor_info("t", (1,) * 9)), "9 dimensions"),
    "absurd shape": (header(tensors=1, rest=tensor_info("t", (HUGE, HUGE))), "cut short"),
    "empty shape": (header(tensors=1, rest=tensor_info("t", (0, 3))), "does not divide"),
    "ragged blocks": (header(tensors=1, rest=tensor_info("t", (33,), kind=2)), "does not divide"),
    "unknown tensor type": (header(tensors=1, rest=tensor_info("t", (1,), kind=999)), "unknown type 999"),
    "integer tensor": (header(tensors=1, rest=tensor_info("t", (1,), kind=26) + bytes(64)), "integer type"),
    "offset out of the file": (header(tensors=1, rest=tensor_info("t", (1,), offset=HUGE)), "cut short"),
    "misaligned offset": (header(tensors=1, rest=tensor_info("t", (1,), offset=1) + bytes(64)), "misaligned"),
    "same tensor twice": (header(tensors=2, rest=tensor_info("t", (1,)) * 2 + bytes(64)), "'t' occurs twice"),
    "overlapping tensors": (
        header(tensors=2, rest=tensor_info("a", (16,)) + tensor_info("b", (16,), offset=32) + bytes(256)),
        "overlaps",
    ),
    "zero alignment": (
        header(pairs=1, rest=pair("general.alignment", 4, struct.pack("<I", 0))),
        "general.alignment",
    ),
    "alignment of text": (header(pairs=1, rest=pair("general.alignment", 8, text("x"))), "general.alignment"),
    "one of a split": (header(pairs=1, rest=pair("split.count", 2, struct.pack("<H", 3))), "split"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_clear_error(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(KvgenError, match=message) as caught:
        read_checkpoint(path)
    assert "hostile.gguf" in str(caught.value)


def test_a_file_cut_anywhere_gives_an_error(small_file: Path, tmp_path: Path) -> None:
    content = small_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(4, len(content) - 32, 7):
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(cut)


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_bytes_are_read_or_refused(small_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(4, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content)
    read_or_refuse(lambda: read_checkpoint(changed))


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rest=st.binary(max_size=400), tensors=st.integers(0, 3), pairs=st.integers(0, 3))
def test_any_bytes_are_read_or_refused(tmp_path: Path, rest: bytes, tensors: int, pairs: int) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(header(tensors=tensors, pairs=pairs, rest=rest))
    read_or_refuse(lambda: read_checkpoint(path))


def read_or_refuse(read: Callable[[], Any]) -> None:
    try:
        read()
    except KvgenError as error:
        assert "\n" not in str(error)
