"""The transformers library: any causal language model of it as the subject of a comparison."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from kvgen.checkpoint import RawCheckpoint, read_checkpoint
from kvgen.checkpoint.raw import read_json_object
from kvgen.comparison.case import CALL_ERRORS
from kvgen.comparison.engines import EngineOptions
from kvgen.comparison.engines.transformers_cache import TransformersCache, cache_names
from kvgen.comparison.engines.transformers_model import TransformersBackend
from kvgen.comparison.subjects import Subject, subject_of
from kvgen.errors import UnsupportedError, UsageError, in_one_line
from kvgen.loading.load import DTYPES, Loaded, choose_device
from kvgen.system import available_memory
from kvgen.tokenizer import Tokenizer, choose_tokenizer, read_tokenizer

__all__ = ["TransformersBackend", "TransformersSubject", "load"]

_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size", "attention_window_size")
_CHUNKS = ("chunk_size", "mamba_chunk_size", "block_size")


class TransformersSubject(Subject):
    """Calls the library without the care that the backend takes, with positions, and with padding."""

    def __init__(self, backend: TransformersBackend) -> None:
        super().__init__(backend)
        self._backend, self.module = backend, backend.net
        self.cannot_cache = backend.cannot_cache
        self.changes_at = (*self._sizes(_WINDOWS), *backend.rope_changes_at)
        self.chunk_sizes = self._sizes(_CHUNKS)
        if backend.cache.startswith("quantized"):
            self.lossy = f"the cache of transformers is {backend.cache}"

    def _sizes(self, names: Sequence[str]) -> tuple[int, ...]:
        found = {getattr(self._backend.config, name, None) for name in names}
        return tuple(sorted(size for size in found if isinstance(size, int) and size > 0))

    @property
    def dtype(self) -> torch.dtype:
        """The library computes norms, softmax and positions in float32 whatever the dtype, so the rounding of its
        float64 is judged as that of float32."""
        return torch.float32 if self._backend.dtype == torch.float64 else self._backend.dtype

    def uncached(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._backend.forward(ids, None, None, use_cache=False, is_first_iteration=True).logits
        return logits

    def append_unchecked(self, new: Tensor, cache: TransformersCache | None = None) -> tuple[Tensor, Any]:
        """The library's documented call: the new ids and the cache, and nothing else."""
        backend = self._backend
        cache = cache or backend.new_cache(len(new), new.shape[1])
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
        self, texts: Sequence[Tensor], cache: TransformersCache | None = None
    ) -> tuple[Tensor, TransformersCache]:
        """Padding is masked and has no positions."""
        longest = max(text.shape[1] for text in texts)
        rows = torch.cat([functional.pad(text, (longest - text.shape[1], 0)) for text in texts])
        mask = torch.cat([functional.pad(torch.ones_like(text), (longest - text.shape[1], 0)) for text in texts])
        logits, cache = self._backend.call(rows, cache, mask=mask)
        self._count(cache)
        return logits, cache

    def in_dtype(self, dtype: torch.dtype) -> TransformersSubject | None:
        """A copy of the model."""
        net = self._backend.net
        size = sum(weight.numel() for weight in net.parameters()) * dtype.itemsize
        if net.dtype == torch.float64 or size > available_memory():
            return None
        wide = copy.deepcopy(net).to(dtype)
        wide.set_experts_implementation("eager")  # others have no float64
        twin = TransformersSubject(TransformersBackend(wide, self._backend.cache))
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
        with redirect_stderr(StringIO()):  # a progress bar that cannot be switched off
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
