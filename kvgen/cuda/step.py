"""A step of one position of one sequence as a list of kernel launches, captured as one CUDA graph.

The list is written once for a decoder. What differs from step to step lies in a table on the GPU: the token, its
position, and where the cache keeps keys and values. So one graph serves every cache, window and length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.cuda.attend import PLACE, PLACES, TURNS, attend, fetch
from kvgen.cuda.matvec import add_normed, matvec
from kvgen.cuda.sizes import matvec_sizes, padded, triton_dtype
from kvgen.model.attention import AttentionModule
from kvgen.model.block import Block
from kvgen.model.decoder import Decoder
from kvgen.model.layers import Linear, MLPModule, RMSNorm

_BLOCK = 64  # positions that a program of `attend` reads at once
_MAX_SPLITS = 64
_PROGRAMS = 2  # of `attend`, for each processor
_MAX_TOGETHER = 8192  # sums that a program of `attend` puts together at once
_HOPPER = (9, 0)  # compute capability: the first with programmatic dependent launch

Launch = Callable[[], Any]


class Step:
    """Computes one position. Projections of queries, keys and values are made views of one matrix.

    stored: dtype of cached keys and values. graph: capture the launches; else they are made one by one.
    """

    def __init__(self, module: Decoder, stored: torch.dtype, graph: bool = True) -> None:
        self._module, self._stored = module, stored
        self.device, dtype = module.device, module.dtype
        empty = partial(torch.empty, device=self.device)
        self._table = empty(PLACES + PLACE * len(module.config.mixers), dtype=torch.int64)
        self._x, self._y = empty(module.config.dim, dtype=dtype), empty(module.config.dim, dtype=dtype)
        self._rotations = [
            tuple(empty(TURNS, 2 * len(rotary.inverse_frequencies), dtype=dtype) for _ in range(2))
            for rotary in module.config.rotaries
        ]
        self._turned: tuple[int, list[bool]] | None = None  # what `_rotations` were computed for
        on_gpu = self.device.type == "cuda"
        self._host_table = torch.empty(len(self._table), dtype=torch.int64, pin_memory=on_gpu)
        self._given = self._host_table.numpy()
        self._done = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._pdl = on_gpu and torch.cuda.get_device_capability(self.device) >= _HOPPER
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 4
        self._launches = [launch for number, block in enumerate(module.blk) for launch in self._block(number, block)]
        self._captures = graph
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, token: int, position: int, length: int, total: int, places: Sequence[int]) -> Tensor:
        """Compute `token` at `position`, after `length` cached positions of a text of `total`: (1, dim).

        places: for each layer, the addresses of its keys and values, their stride between heads in numbers, and the
        position of the first entry. The new keys and values are written there.
        """
        self._turn(position, total)
        if self._done is not None:
            self._done.synchronize()  # the step before has read the table; who has read its logits waits for nothing
        self._given[:PLACES] = token, position, length, total
        self._given[PLACES:] = places
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()
            if self._captures:  # the run has compiled the kernels
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._run()
                self._graph = graph
        if self._done is not None:
            self._done.record()
        return self._x.clone()[None]

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of one hidden state, (1, dim): (1, vocab), rounded to its dtype."""
        module = self._module
        output = module.token_embd if module.output is None else module.output
        bias = None if module.output is None else module.output.bias
        logits = hidden.new_empty((1, len(output.weight)), dtype=torch.float32)
        self._matvec(hidden, output.weight, logits, norm=module.output_norm, bias=bias, pdl=False)()
        return logits

    def _run(self) -> None:
        fetch[(1,)](self._host_table, self._table, len(self._table), padded(len(self._table)))
        self._x.copy_(self._module.embed_rows(self._table[:1], self._table[1:2])[0])
        for launch in self._launches:
            launch()

    def _turn(self, position: int, total: int) -> None:
        """Compute the rotations of TURNS positions, if they do not hold those of `position`."""
        first, rotaries = position // TURNS * TURNS, self._module.config.rotaries
        wanted = first, [rotary.is_long(total) for rotary in rotaries]
        if wanted == self._turned:
            return
        positions = torch.arange(first, first + TURNS, device=self.device)
        for make, long, parts in zip(self._module.rotaries, wanted[1], self._rotations, strict=True):
            for part, table in zip(parts, make(positions, positions >= 0 if long else None), strict=True):
                part.copy_(table)
        self._turned = wanted

    def _block(self, number: int, block: nn.Module) -> list[Launch]:
        assert isinstance(block, Block)
        attention, mlp = block.attn, block.ffn
        assert isinstance(attention, AttentionModule) and isinstance(mlp, MLPModule) and mlp.gate is not None
        weight, bias = _joined(attention)
        projected = self._x.new_empty(len(weight))
        mixed = self._x.new_empty(attention.q.weight.shape[0])
        hidden = self._x.new_empty(mlp.spec.width)
        return [
            self._matvec(self._x, weight, projected, norm=block.attn_norm, bias=bias),
            self._attend(number, attention, projected, mixed),
            *self._added(mixed, attention.output, block.post_attention_norm),
            self._gated(mlp, hidden, block.ffn_norm),
            *self._added(hidden, mlp.down, block.post_ffw_norm),
        ]

    def _gated(self, mlp: MLPModule, out: Tensor, norm: nn.Module) -> Launch:
        assert mlp.gate is not None
        return self._matvec(
            *(self._x, mlp.gate.weight, out),
            norm=norm,
            bias=mlp.gate.bias,
            other=mlp.up.weight,
            other_bias=mlp.up.bias,
            activation=str(mlp.spec.activation),
        )

    def _added(self, x: Tensor, linear: Linear, norm: nn.Module) -> list[Launch]:
        """Add the output of a linear layer, normalized or not, to the residual stream."""
        if not isinstance(norm, RMSNorm):
            return [self._matvec(x, linear.weight, self._x, bias=linear.bias, residual=self._x)]
        size, scale = len(self._y), float(self._module.config.residual_scale)
        normed = partial(
            add_normed[(1,)], self._y, norm.weight, self._x, norm.eps, scale, size, padded(size), self._pdl
        )
        product = self._matvec(x, linear.weight, self._y, bias=linear.bias)
        return [product, partial(normed, num_warps=8, launch_pdl=self._pdl)]

    def _matvec(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        norm: nn.Module | None = None,
        bias: Tensor | None = None,
        other: Tensor | None = None,
        other_bias: Tensor | None = None,
        activation: str = "",
        residual: Tensor | None = None,
        pdl: bool = True,
    ) -> Launch:
        normed = norm if isinstance(norm, RMSNorm) else None
        outputs, inputs = weight.shape
        rows, chunk = matvec_sizes(outputs, inputs, gated=other is not None)
        return partial(
            matvec[(-(-outputs // rows),)],
            *(x, None if normed is None else normed.weight, weight, other, bias, other_bias, residual, out),
            0.0 if normed is None else normed.eps,
            float(self._module.config.residual_scale),
            outputs,
            INPUTS=inputs,
            ROWS=rows,
            CHUNK=chunk,
            ACTIVATION=activation,
            PDL=pdl and self._pdl,
            launch_pdl=pdl and self._pdl,
        )

    def _attend(self, number: int, module: AttentionModule, projected: Tensor, out: Tensor) -> Launch:
        spec, config = module.spec, self._module.config
        group = spec.heads // spec.kv_heads
        programs = _PROGRAMS * self._processors
        splits = max(1, min(_MAX_SPLITS, 1 << (programs // spec.kv_heads).bit_length() - 1))
        padded_dim = max(16, padded(spec.head_dim))
        tables = dict(zip(config.rotaries, self._rotations, strict=True))
        q_rotary, k_rotary = spec.query_rotary or spec.rotary, spec.rotary
        q_tables = (None, None) if q_rotary is None else tables[q_rotary]
        k_tables = (None, None) if k_rotary is None else tables[k_rotary]
        q_norm, k_norm = (norm.weight if isinstance(norm, RMSNorm) else None for norm in (module.q_norm, module.k_norm))
        sums = torch.empty(spec.heads, splits, padded_dim, device=self.device)
        stats = torch.empty(2, spec.heads, splits, device=self.device)
        arrivals = torch.zeros(spec.kv_heads, dtype=torch.int32, device=self.device)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        return partial(
            attend[(spec.kv_heads, splits)],
            *(projected, q_norm, k_norm, *q_tables, *k_tables, None if module.sinks is None else module.sinks.weight),
            *(self._table, PLACES + PLACE * number, sums, stats, arrivals, out),
            *(config.norm_eps, float(scale), float(spec.softcap or 0)),
            HEADS=spec.heads,
            GROUP=group,
            DIM=spec.head_dim,
            Q_ROTATED=0 if q_rotary is None else 2 * len(q_rotary.inverse_frequencies),
            K_ROTATED=0 if k_rotary is None else 2 * len(k_rotary.inverse_frequencies),
            WINDOW=spec.window or 0,
            SOFTCAP=spec.softcap is not None,
            STORED=triton_dtype(self._stored),
            SPLITS=splits,
            G=max(16, padded(group)),
            D=padded_dim,
            BLOCK=_BLOCK,
            TOGETHER=max(1, min(padded(group), _MAX_TOGETHER // (splits * padded_dim))),
            TURNS=TURNS,
            PDL=self._pdl,
            launch_pdl=self._pdl,
        )


def _joined(attention: AttentionModule) -> tuple[Tensor, Tensor | None]:
    """Put the projections of queries, keys and values into one matrix, and make their weights views of it."""
    assert attention.v is not None
    parts = [attention.q, attention.k, attention.v]
    sizes = [len(part.weight) for part in parts]
    weight = torch.cat([part.weight for part in parts])
    for part, rows in zip(parts, torch.split(weight, sizes), strict=True):
        part.weight = nn.Parameter(rows, requires_grad=False)
    if all(part.bias is None for part in parts):
        return weight, None
    biases = [
        weight.new_zeros(size) if part.bias is None else part.bias for part, size in zip(parts, sizes, strict=True)
    ]
    return weight, torch.cat(biases)
