"""Fit an adapter to a model: which of the decoder's parameters it changes, and how.

Changes are computed in fp32 in the layout of the decoder, so the model may be stored in any: a transform that reorders
the rows of a weight also reorders those of its change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvgen.backends.adapter import Adapter, LowRank
from kvgen.backends.blueprint import Blueprint, draw_blueprint
from kvgen.checkpoint import RawCheckpoint
from kvgen.checkpoint.multimodal import text_name
from kvgen.errors import CheckpointError
from kvgen.families.family import parameter_sources, parts_of, split_fused, transform_of, transposed

Change = Callable[[Tensor], Tensor]
"""From a parameter of the model to that with the adapter."""


@dataclass(frozen=True)
class Adapted:
    """A checkpoint, the plan of its decoder, and the changes of an adapter, by parameter."""

    raw: RawCheckpoint
    blueprint: Blueprint
    changes: Mapping[str, Change]


def adapt(raw: RawCheckpoint, adapter: Adapter | None) -> Adapted:
    """Plan the decoder of a checkpoint with an adapter.

    Raises CheckpointError for a tensor of the adapter that does not fit, and as `draw_blueprint`.
    """
    blueprint = draw_blueprint(raw)
    if adapter is None:
        return Adapted(raw, blueprint, {})
    fitting = _Fitting(raw, blueprint, adapter)
    if blueprint.decoder.config.tied_head and not fitting.changed.isdisjoint(("token_embd.weight", "output.weight")):
        raw = _untied(raw, blueprint)
        blueprint = draw_blueprint(raw)
        fitting = _Fitting(raw, blueprint, adapter)
    return Adapted(raw, blueprint, fitting.changes())


def _untied(raw: RawCheckpoint, blueprint: Blueprint) -> RawCheckpoint:
    """Store the head beside the embedding, since PEFT changes each of them alone."""
    family = blueprint.family
    table = family.gguf_names if raw.format == "gguf" else family.hf_names
    head = next(name for name, target in table.items() if target == "output")
    embedding = raw.tensors[blueprint.sources["token_embd.weight"][0]]
    return replace(raw, tensors={**raw.tensors, f"{head}.weight": embedding})


class _Fitting:
    """Maps the tensors of an adapter to the parameters of a decoder.

    changed: the parameters that the adapter changes.
    """

    def __init__(self, raw: RawCheckpoint, blueprint: Blueprint, adapter: Adapter) -> None:
        self.raw, self.adapter, self.names = raw, adapter, blueprint.family.hf_names
        self.config = blueprint.decoder.config
        self.transforms = blueprint.family.hf_transforms(self.config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in blueprint.decoder.named_parameters()}
        self.low_rank = {text_name(name): change for name, change in adapter.low_rank.items()}
        self.replaced = {text_name(name): tensor for name, tensor in adapter.replaced.items()}
        self.low_rank_sources, self.replaced_sources = self._sources(self.low_rank), self._sources(self.replaced)
        sources = (*self.low_rank_sources, *self.replaced_sources)
        self.changed = {parameter for source in sources for parameter in parts_of(source)}

    def changes(self) -> dict[str, Change]:
        """Return how each parameter changes. Raises CheckpointError for a tensor that the model lacks."""
        changes: dict[str, Change] = {}
        for source, names in self.replaced_sources.items():
            self._check(source, names, [self.replaced[name].shape for name in names])
            for index, parameter in enumerate(parts_of(source)):
                changes[parameter] = partial(self._replace, source, names, index)
        for source, names in self.low_rank_sources.items():
            self._check(source, names, [_shape(self.low_rank[name], self._is_transposed(source)) for name in names])
            for index, parameter in enumerate(parts_of(source)):
                before = changes.get(parameter)
                changes[parameter] = partial(self._add, source, names, index, before)
        return changes

    def _sources(self, names: Iterable[str]) -> dict[str, list[str]]:
        found, unknown = parameter_sources(names, self.names)
        if unknown:
            raise self._foreign(min(unknown))
        return found

    def _foreign(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter.path}: changes {name!r:.200}, which {self.raw.path} does not have")

    def _is_transposed(self, source: str) -> bool:
        """Whether the model stores (in, out); PEFT's `fan_in_fan_out`, which it corrects itself."""
        return transform_of(self.transforms, source) is transposed

    def _check(self, source: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise CheckpointError unless tensors with these shapes fit; in the words of the file, if they are in it."""
        expected = [self.shapes[name] for name in parts_of(source) if name in self.shapes]
        if not expected:
            raise self._foreign(names[0])
        for name, shape in zip(names, shapes, strict=True):
            if name in self.raw.tensors and shape != self.raw.tensors[name].shape:
                raise self._misfit(name, shape, [self.raw.tensors[name].shape])
        try:
            pieces = self._pieces(source, [torch.empty(shape, device="meta") for shape in shapes])
        except (RuntimeError, IndexError):
            pieces = []
        if [tuple(piece.shape) for piece in pieces] != expected:
            raise self._misfit(names[0], shapes[0], expected)

    def _misfit(self, name: str, shape: tuple[int, ...], expected: Sequence[tuple[int, ...]]) -> CheckpointError:
        return CheckpointError(
            f"{self.adapter.path}: changes {name!r:.200} as if its shape were {shape}, "
            f"but in {self.raw.path} it is {' and '.join(map(str, expected))}"
        )

    def _pieces(self, source: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors in the layout of Hugging Face as the decoder's; `tensors`: one, or one for each expert."""
        tensor, transform = tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)), self._transform(source)
        return split_fused(transform(tensor), source, self.config)

    def _transform(self, source: str) -> Change:
        return transform_of(self.transforms, source) or (lambda tensor: tensor)

    def _replace(self, source: str, names: Sequence[str], index: int, base: Tensor) -> Tensor:
        return self._pieces(source, [self.replaced[name].read() for name in names])[index]

    def _add(self, source: str, names: Sequence[str], index: int, before: Change | None, base: Tensor) -> Tensor:
        changes, is_transposed = [self.low_rank[name] for name in names], self._is_transposed(source)
        base = before(base) if before else base
        base = base.to(torch.promote_types(base.dtype, torch.float32))
        changed: Tensor = base + self._pieces(source, [_product(change, is_transposed) for change in changes])[index]
        magnitudes = [change.magnitude.read().float() for change in changes if change.magnitude is not None]
        if not magnitudes:
            return changed
        if changes[0].embedding:
            changed *= magnitudes[0] / torch.linalg.vector_norm(changed, dim=0)
        else:
            changed *= (self._pieces(source, magnitudes)[index] / torch.linalg.vector_norm(changed, dim=-1))[..., None]
        return changed


def _shape(change: LowRank, is_transposed: bool) -> tuple[int, int]:
    """Return the shape of a weight as the model stores it."""
    out, inputs = change.b.shape[0], change.a.shape[1]
    return (inputs, out) if change.embedding or is_transposed else (out, inputs)


def _product(change: LowRank, is_transposed: bool) -> Tensor:
    product = change.scale * (change.b.read().float() @ change.a.read().float())
    return product.T if change.embedding or is_transposed else product
