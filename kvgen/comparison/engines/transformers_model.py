"""Models of the transformers library behind the contract, with any cache that the library has for them.

Each call hands over what is new, as the library's `generate` does. A cache that no longer fits the text is cropped
where the library can crop it; otherwise it is reset, or made anew, and the whole text is computed again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from io import StringIO
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationMode

from kvgen.comparison.case import CALL_ERRORS
from kvgen.comparison.engines.transformers_cache import TransformersCache, cache_names
from kvgen.contract import Backend
from kvgen.errors import UnsupportedError, in_one_line

_ROOM = 512  # least positions of a static cache


class TransformersBackend(Backend):
    """A model of the library. cache: a key of `cache_names`."""

    name = "transformers"
    rewinds = True

    def __init__(self, net: Any, cache: str = "auto") -> None:
        self.net, self.cache = net.eval(), cache
        self.device, self.dtype = net.device, net.dtype
        self.accepts = inspect.signature(net.forward).parameters
        self.config = net.config.get_text_config(decoder=True)
        self.vocab_size = getattr(self.config, "vocab_size", None)
        longest = getattr(self.config, "max_position_embeddings", None)
        longest = longest if isinstance(longest, int) and longest > 0 else None
        self.context_length, self.rope_changes_at = _scaled(self.config, longest)
        attention = getattr(net.config, "_attn_implementation", None) or "attention"
        self.engine = f"transformers {transformers.__version__}, {attention}, cache {cache}"
        self.cannot_cache = self._refusal()

    def _refusal(self) -> str | None:
        """Why the library cannot use this cache for this model, in its words; None if it can."""
        try:
            if self.cache != "auto" and not self.new_cache(1, 2).state:
                return f"transformers has no {self.cache} cache for {type(self.net).__name__}, which makes its own"
            _, cache = self(torch.zeros(1, 2, dtype=torch.int64, device=self.device))
        except (*CALL_ERRORS, ImportError) as error:
            return f"transformers: {in_one_line(error)}"
        return f"{type(self.net).__name__} of transformers stores nothing in a cache" if cache.empty else None

    def __call__(self, ids: Tensor, cache: TransformersCache | None = None, /) -> tuple[Tensor, TransformersCache]:
        return self.call(ids, cache)

    def call(
        self,
        ids: Tensor,
        cache: TransformersCache | None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, TransformersCache]:
        """The contract, with positions, (B, n) or (1, n), and a mask of what is not padding, (B, n)."""
        cache = self._fitting(ids, cache)
        known, n = cache.ids.shape[1], ids.shape[1]
        new = {"next_sequence_length": n - known} if known else {}
        outputs = self.forward(ids, positions, mask, is_first_iteration=not known, use_cache=True, **new, **cache.state)
        cache.state = self.net._update_model_kwargs_for_generation(outputs, cache.state)
        cache.ids, cache.reused, cache.computed = ids.clone(), known, n - known
        return outputs.logits, cache

    @torch.no_grad()
    def forward(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, kept: int | Tensor = 1, **arguments: Any
    ) -> Any:
        """Prepare and make a call of the model as `generate` does.

        kept: number of last positions, or the positions, that a model which can choose returns logits of.
        """
        if "position_ids" in self.accepts:
            if positions is None:
                seen = torch.ones_like(ids) if mask is None else mask
                positions = self.net._prepare_position_ids_for_generation(ids, {"attention_mask": seen})
            arguments["position_ids"] = positions
        elif positions is not None:
            raise UnsupportedError(f"{type(self.net).__name__} of transformers takes no position_ids")
        with redirect_stdout(StringIO()):  # some models print
            inputs = self.net.prepare_inputs_for_generation(ids, attention_mask=mask, **arguments)
            if "logits_to_keep" in self.accepts:
                inputs["logits_to_keep"] = kept
            outputs = self.net(**inputs, return_dict=True)
        if not isinstance(outputs.logits, Tensor) or outputs.logits.ndim != 3:
            raise UnsupportedError(f"{type(self.net).__name__} of transformers does not return one set of logits")
        return outputs

    def _fitting(self, ids: Tensor, cache: TransformersCache | None) -> TransformersCache:
        """The cache, left with a prefix of `ids` and its ids cut to that; otherwise an empty one."""
        batch, n = ids.shape
        if cache is None or not cache.state or len(cache.ids) != batch or n > (cache.room or n):
            return self.new_cache(batch, n)
        self._reorder(ids, cache)
        held = cache.ids.shape[1]
        limit = min(held, n - 1)
        known = int((cache.ids[:, :limit] == ids[:, :limit]).all(0).long().cumprod(0).sum())
        if known == held:
            return cache
        stored = next(iter(cache.state.values()))
        if not isinstance(stored, Cache):
            return self.new_cache(batch, n)
        try:
            if known and stored.is_croppable:
                stored.crop(known - held)
                cache.ids = cache.ids[:, :known]
                return cache
        except (RuntimeError, TypeError):
            pass  # a window has dropped what is needed, or the cache of a decoder is static
        stored.reset()
        cache.ids = cache.ids[:, :0]
        return cache

    def _reorder(self, ids: Tensor, cache: TransformersCache) -> None:
        """If the rows of a cache continue in another order, put them into that order, as beam search does."""
        held = cache.ids.shape[1]
        if len(ids) == 1 or held >= ids.shape[1] or torch.equal(cache.ids, ids[:, :held]):
            return
        equal = (ids[:, None, :held] == cache.ids[None]).all(-1)  # (B, B)
        if not equal.any(1).all():
            return
        order = equal.int().argmax(1)
        stored = next(iter(cache.state.values()))
        if hasattr(stored, "reorder_cache"):
            stored.reorder_cache(order)
            cache.ids = cache.ids[order]

    def new_cache(self, batch: int, n: int) -> TransformersCache:
        """An empty cache, as `generate` makes it; models that make their own get none."""
        state: dict[str, Any] = {}
        room = min(max(_ROOM, 2 * n), self.context_length or 2 * n + _ROOM)
        chosen, _ = self.net._prepare_generation_config(None, **cache_names()[self.cache])
        self.net._prepare_cache_for_generation(chosen, state, GenerationMode.GREEDY_SEARCH, batch, room)
        stored = next(iter(state.values()), None)
        own = stored.self_attention_cache if isinstance(stored, EncoderDecoderCache) else stored
        empty = torch.empty(batch, 0, dtype=torch.int64, device=self.device)
        return TransformersCache(state, empty, room if isinstance(own, StaticCache) else None)

    @cached_property
    def _chooses(self) -> bool:
        """Whether the model returns logits of the positions that it is asked for, of the text alone."""
        ids = torch.arange(3, device=self.device)[None]
        try:
            found, whole = (
                self.forward(ids, None, None, kept, use_cache=False, is_first_iteration=True).logits.shape[1]
                for kept in (ids[0, :2], 0)
            )
        except IndexError:  # it computes the last position only
            return False
        return "logits_to_keep" in self.accepts and (found, whole) == (2, 3)

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor] | None:
        kept = torch.tensor(positions, device=ids.device)
        chosen = kept if self._chooses else 0  # 0: all
        logits: Tensor = self.forward(ids, None, None, chosen, use_cache=False, is_first_iteration=True).logits
        if self._chooses:
            return iter([logits[0]])
        return iter([logits[0, kept]]) if logits.shape[1] == ids.shape[1] > 1 else None


def _scaled(config: Any, longest: int | None) -> tuple[int | None, tuple[int, ...]]:
    """The context length, and lengths from which rotary positions are scaled otherwise.

    Dynamic scaling goes on beyond `max_position_embeddings`; with `longrope`, other factors apply from some length on.
    """
    given = getattr(config, "rope_parameters", None) or {}
    changes: tuple[int, ...] = ()
    for rope in (given, *(part for part in given.values() if isinstance(part, dict))):
        kind, first = rope.get("rope_type", ""), rope.get("original_max_position_embeddings")
        if "dynamic" in kind and longest:
            return int(longest * rope.get("factor", 1)), (longest,)
        if kind == "longrope" and isinstance(first, int):
            changes = (first,)
    return longest, changes
