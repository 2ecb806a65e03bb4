"""The Triton kernel for attention of one new position: norms and rotation, the cache's new entry, and the sum.

The positions of each key and value head are divided among programs (Dao et al. 2023, "Flash-Decoding"); the last one
to finish puts their sums together.
"""
# The annotations of parameters are read by Triton, so they are not postponed.

import triton
import triton.language as tl
from triton.language.extra import cuda

TURNS = 256
"""Positions in the tables of rotations."""

PLACES = 4
"""Entries of `table` before those of layers: token, position, cached positions, length of the whole text."""

PLACE = 4
"""Entries of a layer: addresses of its keys and values, their stride between heads, and the position of the first."""


@triton.jit
def fetch(given, table, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Copy the table, (SIZE,), from page-locked memory of the host."""
    at = tl.arange(0, PADDED)
    tl.store(table + at, tl.load(given + at, mask=at < SIZE), mask=at < SIZE)


@triton.jit
def attend(
    qkv,
    q_norm,
    k_norm,
    q_cos,
    q_sin,
    k_cos,
    k_sin,
    sinks,
    table,
    place,
    sums,
    stats,
    arrivals,
    out,
    eps,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    Q_ROTATED: tl.constexpr,
    K_ROTATED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STORED: tl.constexpr,
    SPLITS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    TURNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (key and value heads, SPLITS).

    qkv: projections of the new position, ((HEADS + 2 * kv heads) * DIM,). q_cos to k_sin: rotations of positions
    from a multiple of TURNS, (TURNS, ROTATED) each.
    place: index in `table` of the layer's entries. STORED: dtype of the cache; int8 has an fp32 scale after each DIM.
    sums: (HEADS, SPLITS, D), and stats: (2, HEADS, SPLITS), of each program, in fp32. arrivals: (kv heads,) int32,
    zero before and after. out: (HEADS * DIM,). WINDOW: 0 for none. G, D: GROUP and DIM, padded.
    """
    dtype = qkv.dtype.element_ty
    head, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(table + 2)
    stride, first = tl.load(table + place + 2), tl.load(table + place + 3)
    ROW: tl.constexpr = DIM + 4 if STORED == tl.int8 else DIM
    keys = tl.load(table + place).to(tl.pointer_type(STORED)) + head * stride
    values = tl.load(table + place + 1).to(tl.pointer_type(STORED)) + head * stride
    if STORED != tl.int8 and DIM % 16 == 0:
        keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)

    g, d = tl.arange(0, G), tl.arange(0, D)
    within = d < DIM
    seen = tl.maximum(length - WINDOW + 1, 0) if WINDOW > 0 else 0
    each = tl.cdiv(tl.maximum(tl.cdiv(length - seen, SPLITS), 1), BLOCK) * BLOCK
    start = seen + split * each
    end = tl.minimum(start + each, length)
    # What earlier steps have written need not wait for the projections of this one.
    positions = tl.arange(0, BLOCK)
    k_block = _decoded(keys, d[:, None], (start + positions)[None, :], end, first, within[:, None], dtype, ROW, STORED)
    v_block = _decoded(
        values, d[None, :], (start + positions)[:, None], end, first, within[None, :], dtype, ROW, STORED
    )
    turn = tl.load(table + 1) % TURNS  # row in the tables of rotations
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    heads = head * GROUP + g
    real = (g < GROUP)[:, None] & within[None, :]
    q = _turned(qkv + heads[:, None] * DIM, q_norm, q_cos, q_sin, turn, d[None, :], real, eps, DIM, Q_ROTATED)
    k = _turned(qkv + (HEADS + head) * DIM, k_norm, k_cos, k_sin, turn, d, within, eps, DIM, K_ROTATED)
    v = tl.load(qkv + (HEADS + HEADS // GROUP + head) * DIM + d, mask=within, other=0.0).to(tl.float32)
    at = (length - first) * ROW
    k = _kept(k, keys + at, d, within, split == 0, dtype, DIM, STORED)
    v = _kept(v, values + at, d, within, split == 0, dtype, DIM, STORED)

    # The first program begins with the new position and the sink, the others with nothing.
    score = _capped(tl.sum(q.to(tl.float32) * k[None, :], 1) * scale, softcap, SOFTCAP)  # (G,)
    top = score
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=g < GROUP, other=0.0).to(tl.float32)
        top = tl.maximum(score, sink)
    share = tl.exp(score - top)
    total = share
    if sinks is not None:
        total += tl.exp(sink - top)
    begins = split == 0
    mixed = tl.where(begins, share[:, None] * v[None, :], 0.0)  # (G, D)
    total = tl.where(begins, total, 0.0)
    top = tl.where(begins, top, float("-inf"))

    for block in range(start, end, BLOCK):
        used = block + positions < end
        k_used, v_used = k_block, v_block
        k_block = _decoded(
            keys, d[:, None], (block + BLOCK + positions)[None, :], end, first, within[:, None], dtype, ROW, STORED
        )
        v_block = _decoded(
            values, d[None, :], (block + BLOCK + positions)[:, None], end, first, within[None, :], dtype, ROW, STORED
        )
        scores = _capped(tl.dot(q, k_used, input_precision="ieee") * scale, softcap, SOFTCAP)  # (G, BLOCK)
        scores = tl.where(used[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrunk = tl.exp(top - higher)
        shares = tl.exp(scores - higher[:, None])
        total = total * shrunk + tl.sum(shares, 1)
        mixed = mixed * shrunk[:, None] + tl.dot(shares.to(dtype), v_used, input_precision="ieee")
        top = higher

    row = heads * SPLITS + split
    tl.store(sums + row[:, None] * D + d[None, :], mixed, mask=(g < GROUP)[:, None])
    tl.store(stats + row, top, mask=g < GROUP)
    tl.store(stats + HEADS * SPLITS + row, total, mask=g < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + head, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrivals + head, 0)
        for first_head in range(head * GROUP, (head + 1) * GROUP, TOGETHER):
            _combine(sums, stats, out, first_head, (head + 1) * GROUP, HEADS, TOGETHER, SPLITS, DIM, D)


@triton.jit
def _combine(
    sums,
    stats,
    out,
    head,
    end,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
):
    """Write the outputs of TOGETHER heads, up to `end`, from the sums of all programs.

    These are read from L2, as L1 may hold older ones.
    """
    heads, d = head + tl.arange(0, TOGETHER), tl.arange(0, D)
    real = heads < end
    rows = heads[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]  # (TOGETHER, SPLITS)
    tops = tl.load(stats + rows, mask=real[:, None], other=0.0, cache_modifier=".cg")
    totals = tl.load(stats + HEADS * SPLITS + rows, mask=real[:, None], other=1.0, cache_modifier=".cg")
    mixed = tl.load(
        sums + rows[:, :, None] * D + d[None, None, :], mask=real[:, None, None], other=0.0, cache_modifier=".cg"
    )
    shares = tl.exp(tops - tl.max(tops, 1)[:, None])
    shares = shares / tl.sum(totals * shares, 1)[:, None]
    mixed = tl.sum(mixed * shares[:, :, None], 1)  # (TOGETHER, D)
    at = out + heads[:, None] * DIM + d[None, :]
    tl.store(at, mixed.to(out.dtype.element_ty), mask=real[:, None] & (d < DIM)[None, :])


@triton.jit
def _turned(x, norm, cos, sin, turn, d, inside, eps, DIM: tl.constexpr, ROTATED: tl.constexpr):
    """Normalize and rotate heads at x, (..., D), in the dtype of x; see `layers.rotate`."""
    dtype = x.dtype.element_ty
    turned, second = d < ROTATED, d >= ROTATED // 2
    partner = tl.where(turned, tl.where(second, d - ROTATED // 2, d + ROTATED // 2), d)
    own = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    across = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(own * own, len(own.shape) - 1, keep_dims=True) / DIM + eps)
        own = (own * factor).to(dtype) * tl.load(norm + d, mask=d < DIM, other=0.0)
        across = (across * factor).to(dtype) * tl.load(norm + partner, mask=d < DIM, other=0.0)
        own, across = own.to(tl.float32), across.to(tl.float32)
    if ROTATED > 0:
        across = tl.where(second, across, -across)
        cosines = tl.load(cos + turn * ROTATED + d, mask=turned, other=1.0).to(tl.float32)
        sines = tl.load(sin + turn * ROTATED + d, mask=turned, other=0.0).to(tl.float32)
        own = own * cosines + across * sines
    return own.to(dtype)


@triton.jit
def _capped(scores, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(scores / softcap), if SOFTCAP."""
    return softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1) if SOFTCAP else scores


@triton.jit
def _kept(x, at, d, inside, writes, dtype: tl.constexpr, DIM: tl.constexpr, STORED: tl.constexpr):
    """Store one head, (D,), in the cache, if `writes`; return what is read of it. See `states.encode`."""
    if STORED == tl.int8:
        x = x.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
        magic: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest even integer
        codes = (tl.where(scale > 0, tl.div_rn(x, scale), 0.0) + magic) - magic
        if writes:
            tl.store(at + d, codes.to(tl.int8), mask=inside)
            tl.store((at + DIM).to(tl.pointer_type(tl.float32)), scale)
        return (codes * scale).to(dtype).to(tl.float32)
    else:
        if writes:
            tl.store(at + d, x.to(STORED), mask=inside)
        return x.to(STORED).to(dtype).to(tl.float32)


@triton.jit
def _decoded(head, d, positions, end, first, within, dtype: tl.constexpr, ROW: tl.constexpr, STORED: tl.constexpr):
    """Read cached numbers at positions before `end`; see `states.decode`. head: address of that at `first`."""
    inside = (positions < end) & within
    at = head + (positions - first) * ROW + d
    if STORED == tl.int8:
        scale = (head + (positions - first) * ROW + ROW - 4).to(tl.pointer_type(tl.float32))
        codes = tl.load(at, mask=inside, other=0).to(tl.float32)
        return (codes * tl.load(scale, mask=positions < end, other=0.0)).to(dtype)
    else:
        return tl.load(at, mask=inside, other=0.0).to(dtype)
