"""Plan a decoder from a checkpoint's header, before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, in_one_line
from kvgen.families import Family, find_family
from kvgen.families.family import parts_of
from kvgen.model.decoder import Decoder


@dataclass(frozen=True)
class Blueprint:
    """The plan of a decoder.

    decoder: on the meta device, without memory. sources: parameter, or fused group of parameters -> its tensors.
    """

    family: Family
    decoder: Decoder
    sources: Mapping[str, Sequence[str]]


def draw_blueprint(raw: RawCheckpoint) -> Blueprint:
    """Plan the decoder. Raises CheckpointError for missing or unknown tensors, UnsupportedError for other models."""
    family = find_family(raw)
    try:
        config = family.config(raw)
        with torch.device("meta"):
            decoder = Decoder(config)
    except (RuntimeError, TypeError, ArithmeticError, ValueError, LookupError, MemoryError) as error:  # 2^63, log(0)
        raise CheckpointError(f"{raw.path}: its config has impossible values ({in_one_line(error)})") from error
    sources, unknown = family.sources(raw, config)
    wanted = {name for name, _ in decoder.named_parameters()}
    homes = {parameter: source for source in sources for parameter in parts_of(source)}
    refuse_tensors(raw.path, wanted - homes.keys(), "is missing")
    unused = [sources[homes[name]][0] for name in homes.keys() - wanted]
    refuse_tensors(raw.path, [*unknown, *unused], "is not part of this kind of model")
    return Blueprint(family, decoder, sources)


def refuse_tensors(path: Path, names: Iterable[str], problem: str) -> None:
    """Raise CheckpointError for the tensors in `names`, if there are any."""
    if names := sorted(names):
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(f"{path}: the tensor {names[0]!r}{more} {problem}")
