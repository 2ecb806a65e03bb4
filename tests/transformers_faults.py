"""Ways to break the caches of the transformers library, by patching its classes. Calls without a cache stay right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

_DIRECTIONS = ("keys", "values")


@dataclass(frozen=True)
class Fault:
    """plant: patches the library. names: the findings that name it rightly; `unexplained` never does.

    model: a model type on which it shows. thorough: whether only `--thorough` shows it.
    """

    plant: Callable[[pytest.MonkeyPatch], None]
    names: set[str]
    model: str = "llama"
    cache: str = "auto"
    thorough: bool = False


def _around(owner: type[Any], method: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replace a method by `change(original, self, ...)`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, method)
        patch.setattr(owner, method, lambda self, *given, **named: change(original, self, *given, **named))

    return plant


def _stored(change: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    """Change what a layer holds, (B, H, n, D), before each later call, given the number of new positions."""

    def update(original: Any, layer: Any, keys: Tensor, values: Tensor, *given: Any, **named: Any) -> Any:
        if layer.is_initialized and layer.get_seq_length() > 0:
            for name in _DIRECTIONS:
                setattr(layer, name, change(getattr(layer, name), keys.shape[-2]))
        return original(layer, keys, values, *given, **named)

    return update


def _new(change: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    """Change the new keys and values, (B, H, n, D), given how many are cached."""

    def update(original: Any, layer: Any, keys: Tensor, values: Tensor, *given: Any, **named: Any) -> Any:
        known = int(layer.get_seq_length()) if layer.is_initialized else 0
        return original(layer, change(keys, known), change(values, known), *given, **named)

    return update


def _rounded(stored: Tensor, new: int) -> Tensor:
    scale = stored.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    return (stored / scale).round() * scale


def _evicted(stored: Tensor, new: int) -> Tensor:
    """The first position is dropped once there are 20; its place holds the second."""
    if stored.shape[-2] <= 20:
        return stored
    return torch.cat((stored[..., 1:2, :], stored[..., 1:, :]), dim=-2)


def _overwritten(stored: Tensor, new: int) -> Tensor:
    """Past 200 positions the last ones are lost."""
    kept = stored.clone()
    kept[..., 200:, :] = 0
    return kept


def _reversed_chunk(new: Tensor, known: int) -> Tensor:
    return new.flip(-2) if known and new.shape[-2] > 1 else new


def _five_reversed(new: Tensor, known: int) -> Tensor:
    return new.flip(-2) if known and new.shape[-2] == 5 else new


def _rows_rolled_in_chunks(stored: Tensor, new: int) -> Tensor:
    return stored.roll(1, 0) if new > 1 else stored


def _after_100_updates(original: Any, layer: Any, keys: Tensor, values: Tensor, *given: Any, **named: Any) -> Any:
    layer.updates = getattr(layer, "updates", 0) + 1
    if layer.updates > 100:
        layer.values = layer.values.roll(1, -2)
    return original(layer, keys, values, *given, **named)


def _crop(cut: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    def crop(original: Any, layer: Any, tokens: int) -> None:
        if tokens:
            layer.keys, layer.values = cut(layer.keys, tokens), cut(layer.values, tokens)

    return crop


def _layer_update(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return _around(Cache, "update", change)


def _second_layer_stale(original: Any, cache: Cache, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
    layer = cache.layers[index] if index < len(cache.layers) else None
    if index == 1 and layer is not None and layer.is_initialized and keys.shape[-2] == 1:
        keys, values = layer.keys[..., -1:, :], layer.values[..., -1:, :]
    return original(cache, keys, values, index, *more)


def _wrong_layer(original: Any, cache: Cache, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
    found = original(cache, keys, values, index, *more)
    if keys.shape[-2] > 1 or index == 0:
        return found
    before = cache.layers[index - 1]
    return tuple(
        torch.cat((getattr(before, name)[..., :-1, :], states[..., -1:, :]), -2)
        for name, states in zip(_DIRECTIONS, found, strict=True)
    )


def _shared_buffer(patch: pytest.MonkeyPatch) -> None:
    """All caches write into one buffer for each layer, (B, H, 4096, D)."""
    buffers: dict[Any, Tensor] = {}
    original = Cache.update

    def update(cache: Cache, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        found = original(cache, keys, values, index, *more)
        layer: Any = cache.layers[index]
        for name, states in zip(_DIRECTIONS, found, strict=True):
            place = (name, index, *states.shape[:2], states.dtype)
            size = (*states.shape[:2], 4096, states.shape[-1])
            buffer = buffers.setdefault(place, states.new_zeros(size))
            new = slice(states.shape[-2] - keys.shape[-2], states.shape[-2])
            buffer[..., new, :] = states[..., new, :]
            setattr(layer, name, buffer[..., : states.shape[-2], :])
        return layer.keys, layer.values

    patch.setattr(Cache, "update", update)


def _length_kept(original: Any, layer: Any) -> None:
    if not layer.is_initialized:
        return
    kept = layer.cumulative_length.clone()
    original(layer)
    layer.cumulative_length.copy_(kept.clamp(max=2))


def _window_of(change: int) -> Callable[..., Any]:
    def initialize(original: Any, layer: Any, sliding_window: int, **more: Any) -> None:
        original(layer, sliding_window=sliding_window + change, **more)

    return initialize


def _positions(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Change the positions of the new tokens of a later call."""

    def prepare(original: Any, net: Any, ids: Tensor, *given: Any, **named: Any) -> Any:
        inputs = original(net, ids, *given, **named)
        if named.get("use_cache") and not named.get("is_first_iteration"):
            inputs["position_ids"] = change(inputs["position_ids"])
        return inputs

    return prepare


def _padding_read(original: Any, net: Any, ids: Tensor, *given: Any, **named: Any) -> Any:
    """The mask is dropped where several tokens are new."""
    if named.get("use_cache") and not named.get("is_first_iteration") and named.get("next_sequence_length", 1) > 1:
        named["attention_mask"] = None
    return original(net, ids, *given, **named)


def _mask_dropped(original: Any, net: Any, ids: Tensor, *given: Any, **named: Any) -> Any:
    if named.get("use_cache") and not named.get("is_first_iteration"):
        named["attention_mask"] = None
    return original(net, ids, *given, **named)


def _static_place(original: Any, layer: Any, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Any:
    """Each later token overwrites the one before it."""
    later = layer.is_initialized and int(layer.cumulative_length) > 0
    if later:
        layer.cumulative_length.sub_(1)
    found = original(layer, keys, values, *more, **named)
    if later:
        layer.cumulative_length.add_(1)
    return found


def _conv_shifted(original: Any, cache: Cache, index: int, **more: Any) -> Tensor | None:
    state = original(cache, index, **more)
    return None if state is None else state.roll(1, -1)


def _state_frozen(original: Any, layer: Any, states: Tensor, index: int = 0, **more: Any) -> Tensor:
    """The recurrent state stays that of the prompt."""
    if layer.is_recurrent_states_initialized[index]:
        return states
    updated: Tensor = original(layer, states, index, **more)
    return updated


def _with_noise(stored: Tensor, new: int) -> Tensor:
    return stored + 0.01 * torch.randn_like(stored)


def _shares(patch: pytest.MonkeyPatch) -> None:
    """A copied cache shares its layers with the original."""

    def shallow(cache: Cache, memo: Any) -> Cache:
        return copy.copy(cache)

    patch.setattr(Cache, "__deepcopy__", shallow, raising=False)


_EDITS = {"edits not noticed", "stale state"}
_WINDOW = {"beyond a length", "short context", "stale context", "longer texts", "lookup wrong"}
_update = _around(DynamicLayer, "update", _stored(_rounded))

FAULTS: dict[str, Fault] = {
    "crop leaves one token": Fault(
        _around(DynamicLayer, "crop", _crop(lambda held, n: torch.cat((held[..., : n - 1, :], held[..., -1:, :]), -2))),
        _EDITS,
    ),
    "crop cuts at the start": Fault(_around(DynamicLayer, "crop", _crop(lambda held, n: held[..., -n:, :])), _EDITS),
    "a layer not updated": Fault(_layer_update(_second_layer_stale), {"stale context", "values wrong", "lookup wrong"}),
    "a layer reads another": Fault(_layer_update(_wrong_layer), {"values wrong", "lookup wrong"}),
    "a buffer for all caches": Fault(_shared_buffer, {"sequences mixed", "stale state", "another request"}),
    "old entries in 8 bits": Fault(_update, {"lower precision"}),
    "old entries in 8 bits, static": Fault(
        _around(StaticLayer, "update", _stored(_rounded)), {"lower precision"}, cache="static"
    ),
    "rows rolled": Fault(_around(DynamicLayer, "update", _stored(lambda held, n: held.roll(1, 0))), {"rows mixed"}),
    "key-value heads swapped": Fault(
        _around(DynamicLayer, "update", _stored(lambda held, n: held.flip(1) if n == 1 else held)), {"values wrong"}
    ),
    "rows not reordered": Fault(
        _around(CacheLayerMixin, "reorder_cache", lambda original, layer, order: None), {"rows mixed"}, thorough=True
    ),
    "static cache not reset": Fault(_around(StaticLayer, "reset", _length_kept), _EDITS, cache="static"),
    "static position one too low": Fault(
        _around(StaticLayer, "update", _static_place), {"stale context", "lookup wrong", "values wrong"}, cache="static"
    ),
    "window one too short": Fault(
        _around(DynamicSlidingWindowLayer, "__init__", _window_of(-1)), _WINDOW, model="mistral"
    ),
    "first token evicted": Fault(_around(DynamicLayer, "update", _stored(_evicted)), _WINDOW),
    "positions restart": Fault(
        _around(GenerationMixin, "prepare_inputs_for_generation", _positions(lambda p: p - p[..., :1])),
        {"offset lost", "lookup wrong"},
    ),
    "position one too far": Fault(
        _around(GenerationMixin, "prepare_inputs_for_generation", _positions(lambda p: p + 1)), {"offset wrong"}
    ),
    "convolution state shifted": Fault(
        _around(Cache, "get_conv_state", _conv_shifted), {"values wrong", "stale context"}, "lfm2"
    ),
    "recurrent state not carried": Fault(
        _around(LinearAttentionLayer, "update_recurrent_state", _state_frozen), {"stale context"}, "qwen3_next"
    ),
    "chunks stored backwards": Fault(
        _around(DynamicLayer, "update", _new(_reversed_chunk)), {"multi-token calls", "chunk boundary"}
    ),
    "entries lost past 200": Fault(_around(DynamicLayer, "update", _stored(_overwritten)), {"longer texts"}),
    "noise in old entries": Fault(_around(DynamicLayer, "update", _stored(_with_noise)), {"not deterministic"}),
    "padding read on later calls": Fault(
        _around(GenerationMixin, "prepare_inputs_for_generation", _mask_dropped), {"padding"}, thorough=True
    ),
    "five new tokens stored backwards": Fault(
        _around(DynamicLayer, "update", _new(_five_reversed)), {"chunk boundary"}, thorough=True
    ),
    "values moved after 100 updates": Fault(
        _around(DynamicLayer, "update", _after_100_updates), {"many calls"}, thorough=True
    ),
    "rows rolled where several tokens are new": Fault(
        _around(DynamicLayer, "update", _stored(_rows_rolled_in_chunks)), {"rows mixed"}, thorough=True
    ),
    "padding read where several tokens are new": Fault(
        _around(GenerationMixin, "prepare_inputs_for_generation", _padding_read), {"padding"}, thorough=True
    ),
    "copies share their layers": Fault(_shares, {"saved caches"}, thorough=True),
}
