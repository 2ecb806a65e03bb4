"""Triton kernels for a step of one position outside attention: matrix times vector, with what surrounds it.

A step reads every weight once, so it is as fast as memory is. Each kernel therefore does all that its output rows need:
the norm before the product, and the activation or the residual after it. Numbers are rounded to the model's dtype where
the modules round them; sums are in fp32.

With PDL (programmatic dependent launch), a kernel starts while the one before it ends: it loads weights, which no
kernel writes, and then waits for the vector.
"""
# The annotations of parameters are read by Triton, so they are not postponed.

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def matvec(
    x,
    norm,
    weight,
    other,
    bias,
    other_bias,
    residual,
    out,
    eps,
    scale,
    outputs,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write y = W f(x) + b, (outputs,); or activation(y) * (W' f(x) + b') with an ACTIVATION.

    x: (INPUTS,). f: RMSNorm with the weight `norm`, (INPUTS,), or nothing. weight, other: W and W', (outputs, INPUTS).
    bias, other_bias: b and b' or None. residual: (outputs,) to which scale * y is added, may be `out`; or None.
    ROWS outputs for each program, CHUNK inputs at a time.
    """
    dtype = x.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CHUNK)
    starts = tl.minimum(rows, outputs - 1).to(tl.int64)[:, None] * INPUTS
    gate = tl.load(weight + starts + columns[None, :], mask=(columns < INPUTS)[None, :], other=0.0)
    if ACTIVATION != "":
        up = tl.load(other + starts + columns[None, :], mask=(columns < INPUTS)[None, :], other=0.0)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    factor = 1.0
    if norm is not None:
        squares = tl.zeros((CHUNK,), tl.float32)
        for start in tl.static_range(0, INPUTS, CHUNK):
            part = tl.load(x + start + columns, mask=start + columns < INPUTS, other=0.0).to(tl.float32)
            squares += part * part
        factor = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)
    sums = tl.zeros((ROWS, CHUNK), tl.float32)
    others = tl.zeros((ROWS, CHUNK), tl.float32)
    for start in tl.static_range(0, INPUTS, CHUNK):
        inside = start + columns < INPUTS
        part = tl.load(x + start + columns, mask=inside, other=0.0)
        if norm is not None:
            part = (part.to(tl.float32) * factor).to(dtype)
            part = part * tl.load(norm + start + columns, mask=inside, other=0.0)
        part = part.to(tl.float32)[None, :]
        if start > 0:
            gate = tl.load(weight + starts + (start + columns)[None, :], mask=inside[None, :], other=0.0)
        sums += gate.to(tl.float32) * part
        if ACTIVATION != "":
            if start > 0:
                up = tl.load(other + starts + (start + columns)[None, :], mask=inside[None, :], other=0.0)
            others += up.to(tl.float32) * part
    y = tl.sum(sums, 1)
    written = rows < outputs
    if bias is not None:
        y += tl.load(bias + rows, mask=written, other=0.0).to(tl.float32)
    y = y.to(dtype)
    if ACTIVATION != "":
        z = tl.sum(others, 1)
        if other_bias is not None:
            z += tl.load(other_bias + rows, mask=written, other=0.0).to(tl.float32)
        y = _activated(y.to(tl.float32), ACTIVATION).to(dtype) * z.to(dtype)
    if residual is not None:
        y = tl.load(residual + rows, mask=written, other=0.0) + (y.to(tl.float32) * scale).to(dtype)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=written)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2 * inner)  # 1 + tanh(u) = 2 sigmoid(2 u)


@triton.jit
def add_normed(y, norm, residual, eps, scale, SIZE: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """residual += scale * RMSNorm(y), all (SIZE,), in one program."""
    dtype = y.dtype.element_ty
    at = tl.arange(0, PADDED)
    inside = at < SIZE
    weight = tl.load(norm + at, mask=inside, other=0.0)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    x = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(dtype) * weight
    added = tl.load(residual + at, mask=inside, other=0.0) + (normed.to(tl.float32) * scale).to(dtype)
    tl.store(residual + at, added, mask=inside)
