"""The x-transformers library as a backend: its `TransformerWrapper`, always called with the full sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.backends.blueprint import refuse_tensors
from kvgen.checkpoint import RawCheckpoint
from kvgen.contract import Backend
from kvgen.errors import CheckpointError, UnsupportedError, UsageError, in_one_line
from kvgen.model.ids import check_form, check_range


@dataclass(frozen=True)
class XTransformersCache:
    """The library's cache and the ids it was computed from.

    reused, computed: positions that the last call found in the cache, and those that it computed.
    """

    intermediates: Any
    ids: Tensor
    reused: int
    computed: int


class XTransformersBackend(Backend):
    """The library's model. It needs care in three points:

    - it takes the whole sequence besides the cache, and derives positions from the length of that sequence;
    - it computes only the last `cache_age` new positions, 1 by default, and silently drops the others;
    - it does not check that the cache belongs to the sequence. This class compares the ids and ignores a cache of
      another text.
    """

    name = "x-transformers"
    rewinds = True
    cannot_cache: str | None = None

    def __init__(self, net: Any, rebuild: Callable[[], nn.Module] | None = None) -> None:
        self.rebuild = rebuild
        self.module: Any = net.eval()  # no dropout, no stochastic depth
        parameter = next(net.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.vocab_size = net.num_tokens
        has_absolute_positions = not net.can_cache_kv_outside_max_seq_len
        self.context_length = net.max_seq_len if has_absolute_positions else None
        if not self.module.can_cache_kv:
            self.cannot_cache = "x-transformers says so of this configuration: can_cache_kv is False"

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: XTransformersCache | None = None, /) -> tuple[Tensor, Any]:
        return self.call(ids, cache)

    def check(self, ids: Tensor) -> None:
        check_form(ids)
        check_range(ids, self.module.num_tokens)

    def call(self, ids: Tensor, cache: XTransformersCache | None, **options: Any) -> tuple[Tensor, Any]:
        """Call the library with further options. A cache of another text is ignored."""
        self.check(ids)
        n = ids.shape[1]
        if self.context_length is not None and n > self.context_length:
            raise UsageError(f"the sequence has {n} positions, but the model has {self.context_length} (max_seq_len)")
        known = cache.ids.shape[1] if cache is not None else 0
        if cache is None or self.cannot_cache or known >= n or not torch.equal(cache.ids, ids[:, :known]):
            known = 0
        else:
            options |= {"cache": cache.intermediates, "cache_age": n - known}
        logits, intermediates = self.module(ids, return_intermediates=True, **options)
        return logits, XTransformersCache(intermediates, ids.clone(), known, n - known)


def build_net(config: Mapping[str, Any], source: str) -> nn.Module:
    """Build the `TransformerWrapper` that a checkpoint's config.json describes, without its weights.

    Raises UnsupportedError if the library is not installed, CheckpointError for arguments that it refuses.
    """
    try:
        from x_transformers import Decoder, TransformerWrapper
    except ImportError:
        raise UnsupportedError(
            f"{source}: needs the x-transformers library: pip install 'kvgen[x-transformers]'"
        ) from None
    try:
        net: nn.Module = TransformerWrapper(**config["wrapper"], attn_layers=Decoder(**config["decoder"]))
    except Exception as error:  # the library checks its arguments in many ways
        raise CheckpointError(f"{source}: x-transformers refuses these arguments ({in_one_line(error)})") from error
    return net


def load_xtransformers(raw: RawCheckpoint, dtype: torch.dtype, device: torch.device) -> XTransformersBackend:
    """Build the library's model for a checkpoint and load its state dict, strictly.

    Raises UnsupportedError if the library is not installed or the model does not decode plain token ids,
    CheckpointError for arguments or tensors that do not fit.
    """
    source = str(raw.path)
    with torch.device("meta"):  # check shapes before the model takes memory
        expected = build_net(raw.metadata, source).state_dict()
    misshapen = {name for name, tensor in expected.items() if raw.tensors.get(name, tensor).shape != tensor.shape}
    refuse_tensors(raw.path, expected.keys() - raw.tensors.keys(), "is missing")
    refuse_tensors(raw.path, raw.tensors.keys() - expected.keys(), "is not part of this model")
    refuse_tensors(raw.path, misshapen, "has a different shape")
    net: Any = build_net(raw.metadata, source)
    net.load_state_dict({name: tensor.read() for name, tensor in raw.tensors.items()})
    net = net.requires_grad_(False).to(device=device, dtype=dtype)
    backend = XTransformersBackend(net, rebuild=lambda: build_net(raw.metadata, source))
    try:
        logits, _ = backend(torch.zeros(1, 1, dtype=torch.int64, device=device), None)
    except (AssertionError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedError(f"{source}: x-transformers cannot run this on plain token ids ({error})") from error
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise UnsupportedError(f"{source}: this configuration returns more than one set of logits")
    return backend
