"""AWQ (arXiv:2306.00978), as AutoAWQ stores it for its GEMM kernels."""

from __future__ import annotations

from collections.abc import Mapping

from kvgen.checkpoint.quantization.integers import SCALE_TYPES, Integers, Parts, assemble, unpack_rows
from kvgen.checkpoint.quantization.settings import Settings
from kvgen.checkpoint.raw import RawTensor
from kvgen.errors import UnsupportedError

# Which code of a word belongs to each of 8 rows: they are stored in the order 0, 2, 4, 6, 1, ...
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def read(settings: Settings, tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Assemble the matrices of a checkpoint, each (R, K) in G groups of columns.

    qweight: int32, (K, R / 8). scales: floating, (G, R). qzeros: int32, (G, R / 8). Both are packed along rows.
    """
    settings.choice("bits", (4,), 4)
    group_size = settings.size("group_size", 128)
    version = settings.get("version") or settings.get("format") or "gemm"
    if settings.get("backend") == "llm-awq":
        version = "llm-awq"  # whatever else is said
    if str(version).lower() != "gemm":
        raise UnsupportedError(f"{settings.shown('version')} {version!r:.80} is not supported (kvgen reads: gemm)")
    settings.choice("zero_point", (True,), True)

    def assembled(parts: Parts) -> RawTensor:
        columns, words = parts.matrix("qweight", ("I32",))
        rows = 8 * words
        groups = parts.count_groups("qweight", columns, group_size)
        parts.require("scales", SCALE_TYPES, (groups, rows))
        parts.require("qzeros", ("I32",), (groups, words))

        def read_integers() -> Integers:
            codes, zeros = (unpack_rows(parts.read(part).T, 4, _ORDER) for part in ("qweight", "qzeros"))
            return Integers(codes, 4, parts.read("scales").T, zeros)

        return parts.assembled_integers("AWQ 4-bit", (rows, columns), groups, read_integers)

    return assemble(settings.path, tensors, "qweight", ("qweight", "qzeros", "scales"), assembled)
