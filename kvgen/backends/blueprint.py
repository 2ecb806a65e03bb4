"""What a checkpoint will be, before any of its tensors is read."""

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
    """What a checkpoint will be, before any of its tensors is read.

    decoder: on the meta device. sources: for each parameter, or fused group of them, the tensors it comes from.
    """

    family: Family
    decoder: Decoder
    sources: Mapping[str, Sequence[str]]


def draw_blueprint(raw: RawCheckpoint) -> Blueprint:
    """Raises CheckpointError for tensors that are missing or unknown, UnsupportedError for what kvgen does not run."""
    family = find_family(raw)
    config = family.config(raw)
    sources, unknown = family.sources(raw)
    try:
        with torch.device("meta"):
            decoder = Decoder(config)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes that multiply to 2^63 and more
        raise CheckpointError(f"{raw.path}: the sizes in its config are absurd ({in_one_line(error)})") from error
    wanted = {name for name, _ in decoder.named_parameters()}
    homes = {parameter: source for source in sources for parameter in parts_of(source)}
    _check_names(raw.path, missing=wanted - homes.keys(), unknown=unknown)
    _check_names(raw.path, missing=[], unknown=[sources[homes[name]][0] for name in homes.keys() - wanted])
    return Blueprint(family, decoder, sources)


def _check_names(path: Path, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    for what, names in (
        ("is missing", sorted(missing)),
        ("is not part of this kind of model", sorted(unknown)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: the tensor {names[0]!r}{more} {what}")
