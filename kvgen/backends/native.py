"""kvgen's own decoder as a backend, and loading it from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from kvgen.backends.adapted import adapt
from kvgen.backends.adapter import Adapter
from kvgen.backends.compute import ComputeOptions
from kvgen.backends.weights import WeightReader
from kvgen.checkpoint import RawCheckpoint
from kvgen.contract import Backend
from kvgen.cuda.lacking import lacking as lacking_steps
from kvgen.cuda.lacking import missing
from kvgen.errors import UnsupportedError, UsageError
from kvgen.kernels.decoder import KernelDecoder
from kvgen.kernels.lacking import lacking
from kvgen.kernels.packed import PackedMatrix
from kvgen.model.cache import KVCache, cache_bytes, position_bytes
from kvgen.model.decoder import Decoder
from kvgen.model.moe import used_share

if TYPE_CHECKING:
    from kvgen.cuda.decoder import CudaDecoder

AnyDecoder: TypeAlias = "Decoder | KernelDecoder | CudaDecoder"


class NativeBackend(Backend):
    """kvgen's own decoder, whose cache stores the ids it was computed from.

    decoder: with torch or kernels. module: the torch decoder; None on the kernels of a CPU. numerics: see
        `ComputeOptions.numerics`.
    """

    name = "native"
    rewinds = True
    batches = True

    def __init__(self, decoder: AnyDecoder, engine: str = "torch", numerics: str = "") -> None:
        self.decoder, self.engine, self.numerics = decoder, engine, numerics
        self.module = _module(decoder)
        self.device, self.dtype = decoder.device, decoder.dtype
        self.vocab_size, self.context_length = decoder.config.vocab_size, decoder.config.context_length
        weights = decoder.weights.items() if isinstance(decoder, KernelDecoder) else decoder.named_parameters()
        sizes = {name: weight.nbytes for name, weight in weights}
        looked_up = {"position_embd.weight", "inputs.token_embd.weight"}
        looked_up |= set() if decoder.config.tied_head else {"token_embd.weight"}
        self.weight_bytes = sum(sizes.values())
        used = {name: size * used_share(decoder.config, name) for name, size in sizes.items() if name not in looked_up}
        self.step_bytes = round(sum(used.values()))
        self.position_bytes = position_bytes(decoder.config, decoder.kv_dtype or self.dtype)

    def __call__(self, ids: Tensor, cache: KVCache | None = None, /) -> tuple[Tensor, KVCache]:
        return self.decoder.forward(ids, cache)

    @property
    def ids_device(self) -> torch.device:
        return torch.device("cpu")

    def watch(self, progress: Callable[[int, int], None] | None) -> bool:
        self.decoder.progress = progress
        return True

    def all_logits(self, ids: Tensor) -> Tensor:
        """Return uncached logits after every position of `ids`, (B, n): (B, n, vocab)."""
        return self.decoder.all_logits(ids)

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        return (logits for (logits,) in self.decoder.each_logits(ids, positions))

    def restored(self, tokens: Tensor, layers: Iterable[Mapping[str, Tensor]], variant: int) -> KVCache:
        """Rebuild the cache of `tokens` from the tensors of what `KVCache.held` returned, layer by layer, as a copy.

        Raises CacheError if it does not fit this model.
        """
        cache = KVCache(self.decoder, self.decoder.kv_dtype)
        cache.states = self.decoder.new_states(tokens.shape[0], self.device, cache.dtype)
        cache.restore(tokens, layers, variant)
        return cache

    def max_drafts(self, length: int) -> int:
        """Drafts must not cross the length where LongRoPE changes frequencies: that changes earlier logits too."""
        config = self.decoder.config
        ends = [rotary.short_length for rotary in config.rotaries if rotary.long_frequencies]
        room = (self.context_length or sys.maxsize) - length
        return max(0, min([room, *(end - length for end in ends if length <= end)]))

    def forward_batch(
        self, sequences: Sequence[Tensor], caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        logits, written = self.decoder.forward_batch(sequences, caches, counts)
        return logits, list(written)

    def cache_for(self, ids: Tensor, max_length: int, donors: Sequence[Any], ended: Sequence[Any] = ()) -> KVCache:
        return self.decoder.cache_for(ids, max_length, donors, ended)

    def expect_branch(self, cache: Any, length: int) -> None:
        cache.wanted.add(length)

    def cache_bytes(self, positions: int) -> int:
        return cache_bytes(self.decoder.config, positions, self.decoder.kv_dtype or self.dtype)


def load_native(
    raw: RawCheckpoint, options: ComputeOptions, pool: Executor, adapter: Adapter | None = None
) -> NativeBackend:
    """Build the decoder of a checkpoint and read its tensors in parallel. With torch, if the kernels lack a mechanism.

    adapter: merged into the weights.

    Raises CheckpointError for tensors that do not fit, UnsupportedError for models that kvgen does not implement or
    that need more memory than there is, or if the kernels are required and lack a mechanism of the model. Raises
    UsageError for 8-bit activations without integer weights.
    """
    adapted = adapt(raw, adapter)
    blueprint = adapted.blueprint
    if options.kernels and (lacked := lacking(blueprint.decoder.config)) is not None:
        if options.required:
            raise UnsupportedError(f"{raw.path}: the kernels lack: {lacked}; use --kernels auto")
        options = replace(options, kernels=False, engine=f"torch (kernels lack: {lacked})")
    reader = WeightReader(adapted, options)
    reader.check_memory()
    state = dict(chain.from_iterable(pool.map(reader.read, blueprint.sources)))
    decoder: AnyDecoder
    if options.kernels:
        integers = any(isinstance(weight, PackedMatrix) and weight.weight.group for weight in state.values())
        if options.activation_bits != 16 and not integers:
            raise UsageError(f"{raw.path} has no integer weights, to which activations of int8 belong; see quantize")
        decoder = KernelDecoder(blueprint.decoder.config, state)
        decoder.activation_bits = options.activation_bits
    else:
        blueprint.decoder.load_state_dict(state, strict=True, assign=True)
        decoder = blueprint.decoder.requires_grad_(False).to(options.device)
        if options.device.type == "cuda":
            # It plans anew for each length, so each step of each layer takes milliseconds.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if options.step_kernels:
            decoder, options = _with_step_kernels(decoder, options)
    decoder.kv_dtype = options.kv_dtype
    return NativeBackend(decoder, options.engine, options.numerics)


def _with_step_kernels(module: Decoder, options: ComputeOptions) -> tuple[AnyDecoder, ComputeOptions]:
    """Return a decoder with kernels for steps on a GPU, if they have its mechanisms, and options that say so."""
    if (needed := missing(options.device)) is not None:
        return module, replace(options, engine=f"torch (step kernels need {needed})")
    if (lacked := lacking_steps(module.config, options.dtype, options.kv_dtype)) is not None:
        return module, replace(options, engine=f"torch (step kernels lack: {lacked})")
    from kvgen.cuda.decoder import CudaDecoder  # imports Triton

    return CudaDecoder(module, options.kv_dtype), replace(options, engine="torch, kernels for steps")


def _module(decoder: AnyDecoder) -> Decoder | None:
    if isinstance(decoder, KernelDecoder):
        return None
    return decoder if isinstance(decoder, Decoder) else decoder.module
