"""The transformers library: any causal language model, with any cache that the library has for it.

Each call hands over what is new, as the library's `generate` does. A cache that no longer fits the text is cropped where
the library can crop it; otherwise it is reset, or made anew, and the whole text is computed again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, EncoderDecoderCache, GenerationMixin, StaticCache, cache_utils
from transformers.generation import GenerationMode, configuration_utils
from transformers.generation.utils import ALL_CACHE_NAMES

from kvgen.checkpoint import RawCheckpoint, read_checkpoint, read_json_object
from kvgen.comparison.case import CALL_ERRORS
from kvgen.comparison.engines import EngineOptions
from kvgen.comparison.subjects import Subject, subject_of
from kvgen.contract import Backend
from kvgen.errors import UnsupportedError, UsageError, in_one_line
from kvgen.loading.load import DTYPES, Loaded, choose_device
from kvgen.system import available_memory
from kvgen.tokenizer import Tokenizer, choose_tokenizer, read_tokenizer

_ROOM = 512  # least positions of a static cache
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def cache_names() -> dict[str, dict[str, Any]]:
    """The caches of the installed library by name: the settings of `generate` that choose each."""
    names = set(configuration_utils.ALL_CACHE_IMPLEMENTATIONS)
    names -= {"quantized", *configuration_utils.DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS}
    backends = [name.removesuffix("QuantizedLayer").lower() for name in dir(cache_utils)]
    return {
        "auto": {},
        **{name: {"cache_implementation": name} for name in sorted(names)},
        **{
            f"quantized-{backend}": {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
            for backend, name in zip(backends, dir(cache_utils), strict=True)
            if name.endswith("QuantizedLayer") and not inspect.isabstract(getattr(cache_utils, name))
        },
    }


@dataclass
class TransformersCache:
    """A cache of the library, which each call writes into.

    state: the cache by the name of the model's argument; empty if the model returned none. ids: what it was computed
    from, (B, n). room: positions that it has been made for; None: any number.
    reused, computed: positions that the last call found in the cache, and those that it computed.
    """

    state: dict[str, Any]
    ids: Tensor
    room: int | None = None
    reused: int = 0
    computed: int = 0


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
        self.context_length = longest if isinstance(longest, int) and longest > 0 else None
        attention = getattr(net.config, "_attn_implementation", None) or "attention"
        self.engine = f"transformers {transformers.__version__}, {attention}, cache {cache}"
        self.cannot_cache = self._refusal()

    def _refusal(self) -> str | None:
        """Why the library cannot use this cache for this model, in its words; None if it can."""
        try:
            if self.cache != "auto" and not self._new(1, 2).state:
                return f"transformers has no {self.cache} cache for {type(self.net).__name__}, which makes its own"
            _, cache = self(torch.zeros(1, 2, dtype=torch.int64, device=self.device))
        except (*CALL_ERRORS, ImportError) as error:
            return f"transformers: {in_one_line(error)}"
        return None if cache.state else f"{type(self.net).__name__} of transformers returns no cache"

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
    def forward(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, **arguments: Any) -> Any:
        """Prepare and make a call of the model as `generate` does; logits of the last position if it can choose."""
        if "position_ids" in self.accepts:
            seen = torch.ones_like(ids) if mask is None else mask
            arguments["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0) if positions is None else positions
        elif positions is not None:
            raise UnsupportedError(f"{type(self.net).__name__} of transformers takes no position_ids")
        if "logits_to_keep" in self.accepts:
            arguments.setdefault("logits_to_keep", 1)
        with redirect_stdout(StringIO()):  # some models print
            inputs = self.net.prepare_inputs_for_generation(ids, attention_mask=mask, **arguments)
            outputs = self.net(**inputs, return_dict=True)
        if not isinstance(outputs.logits, Tensor) or outputs.logits.ndim != 3:
            raise UnsupportedError(f"{type(self.net).__name__} of transformers does not return one set of logits")
        return outputs

    def _fitting(self, ids: Tensor, cache: TransformersCache | None) -> TransformersCache:
        """The cache, left with a prefix of `ids` and its ids cut to that; otherwise an empty one."""
        batch, n = ids.shape
        if cache is None or not cache.state or len(cache.ids) != batch or n > (cache.room or n):
            return self._new(batch, n)
        self._reorder(ids, cache)
        held = cache.ids.shape[1]
        limit = min(held, n - 1)
        known = int((cache.ids[:, :limit] == ids[:, :limit]).all(0).long().cumprod(0).sum())
        if known == held:
            return cache
        stored = next(iter(cache.state.values()))
        if not isinstance(stored, Cache):
            return self._new(batch, n)
        try:
            if known and stored.is_croppable:
                stored.crop(known - held)
                cache.ids = cache.ids[:, :known]
                return cache
        except (RuntimeError, TypeError):  # a window has dropped what is needed, or the cache of a decoder is static
            pass
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
        name, stored = next(iter(cache.state.items()))
        if hasattr(self.net, "_reorder_cache"):
            cache.state[name] = self.net._reorder_cache(stored, order)
        elif hasattr(stored, "reorder_cache"):
            stored.reorder_cache(order)
        else:
            return
        cache.ids = cache.ids[order]

    def _new(self, batch: int, n: int) -> TransformersCache:
        """An empty cache, as `generate` makes it; models that make their own get none."""
        state: dict[str, Any] = {}
        room = min(max(_ROOM, 2 * n), self.context_length or 2 * n + _ROOM)
        chosen, _ = self.net._prepare_generation_config(None, **cache_names()[self.cache])
        self.net._prepare_cache_for_generation(chosen, state, GenerationMode.GREEDY_SEARCH, batch, room)
        stored = next(iter(state.values()), None)
        own = stored.self_attention_cache if isinstance(stored, EncoderDecoderCache) else stored
        empty = torch.empty(batch, 0, dtype=torch.int64, device=self.device)
        return TransformersCache(state, empty, room if isinstance(own, StaticCache) else None)

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor] | None:
        kept = torch.tensor(positions, device=ids.device)
        logits = self.forward(ids, None, None, use_cache=False, is_first_iteration=True, logits_to_keep=kept).logits
        if "logits_to_keep" not in self.accepts:
            if logits.shape[1] != ids.shape[1]:
                return None
            logits = logits[:, kept]
        return iter([logits[0]])


class TransformersSubject(Subject):
    """Calls the library without the care that the backend takes, with positions, and with padding."""

    def __init__(self, backend: TransformersBackend, dtype: torch.dtype | None = None) -> None:
        super().__init__(backend)
        self._backend, self.module, self._dtype = backend, backend.net, dtype or backend.dtype
        self.cannot_cache = backend.cannot_cache
        windows = {getattr(backend.config, name, None) for name in _WINDOWS}
        self.changes_at = tuple(sorted(window for window in windows if isinstance(window, int) and window > 0))
        if backend.cache.startswith("quantized"):
            self.lossy = f"the cache of transformers is {backend.cache}"

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def uncached(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._backend.forward(ids, None, None, use_cache=False, is_first_iteration=True).logits
        return logits

    def append_unchecked(self, new: Tensor, cache: TransformersCache | None = None) -> tuple[Tensor, Any]:
        """The library's documented call: the new ids and the cache, and nothing else."""
        backend = self._backend
        cache = cache or backend._new(len(new), new.shape[1])
        with torch.no_grad():
            outputs = backend.net(input_ids=new, use_cache=True, **cache.state)
        cache.state = backend.net._update_model_kwargs_for_generation(outputs, cache.state)
        cache.reused, cache.computed = cache.ids.shape[1], new.shape[1]
        cache.ids = torch.cat((cache.ids, new), dim=1)
        return outputs.logits, cache

    def with_positions(self, ids: Tensor, cache: TransformersCache | None, positions: Tensor) -> tuple[Tensor, Any]:
        """Cached keys keep the positions that they were computed with."""
        return self._backend.call(ids, cache, positions[None])

    def left_padded(
        self, ids: Tensor, padding: Sequence[int], cache: TransformersCache | None
    ) -> tuple[Tensor, TransformersCache]:
        """The contract for rows, (B, n), of which the first `padding` ids are masked and have no positions."""
        starts = torch.tensor(padding, device=ids.device)[:, None]
        mask = (torch.arange(ids.shape[1], device=ids.device) >= starts).long()
        return self._backend.call(ids, cache, mask=mask)

    def stored(self, cache: TransformersCache) -> TransformersCache:
        """A copy, by which the library documents to keep the cache of a prefix."""
        return copy.deepcopy(cache)

    def in_dtype(self, dtype: torch.dtype) -> TransformersSubject | None:
        """A copy of the model. The library computes norms and softmax in float32 whatever the dtype, so the rounding of
        its float64 is judged as that of float32."""
        net = self._backend.net
        size = sum(weight.numel() for weight in net.parameters()) * dtype.itemsize
        if net.dtype == torch.float64 or size > available_memory():
            return None
        twin = TransformersSubject(
            TransformersBackend(copy.deepcopy(net).to(dtype), self._backend.cache), torch.float32
        )
        try:
            twin(torch.zeros(1, 2, dtype=torch.int64, device=net.device), None)
        except CALL_ERRORS:  # a part of it requires another dtype
            return None
        return twin


subject_of.register(TransformersBackend, TransformersSubject)


def load(path: Path, options: EngineOptions) -> Loaded:
    """See `load_engine`. Code in a checkpoint and pickles never run.

    Raises UsageError for an option that is not known, UnsupportedError in the words of the library if it refuses.
    """
    known = cache_names()
    if options.cache not in known:
        raise UsageError(f"--cache {options.cache!r}: transformers {transformers.__version__} has {', '.join(known)}")
    if options.kv_dtype != "auto":
        raise UsageError("--kv-dtype: transformers chooses it by its cache: --cache " + ", ".join(known))
    if options.dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {options.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    device = choose_device(options.device)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    default = torch.float32 if device.type == "cpu" else "auto"
    file = {} if path.is_dir() else {"gguf_file": path.name}
    try:
        net: Any = AutoModelForCausalLM.from_pretrained(
            path if path.is_dir() else path.parent,
            dtype=DTYPES.get(options.dtype, default),
            attn_implementation=None if options.attention == "auto" else options.attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **file,
        )
        backend = TransformersBackend(net.to(device), options.cache)
    except (*CALL_ERRORS, OSError, ImportError, SafetensorError) as error:
        raise UnsupportedError(f"{path}: transformers refuses it: {in_one_line(error)}") from error
    return Loaded(backend, _tokenizer(path, options, backend), str(path), net.config.to_dict())


def _tokenizer(path: Path, options: EngineOptions, backend: TransformersBackend) -> Tokenizer:
    if options.tokenizer is not None:
        return choose_tokenizer(str(options.tokenizer), backend.vocab_size or 0)
    if path.is_file():
        return read_tokenizer(read_checkpoint(path))
    return read_tokenizer(RawCheckpoint(path, "hf", read_json_object(path / "config.json"), {}))
