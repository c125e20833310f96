"""Triton kernels of the residual add with RMSNorm or LayerNorm: ROWS rows of width D per step, one pass over memory."""

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x, residual, weight, bias, y, total, mean, rstd, rows, dim, eps,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = norm(x + residual) · weight + bias; the sum itself goes to total. All (rows, D) contiguous."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (r < rows)[:, None] & (d < dim)[None, :]
    at = r[:, None] * dim + d[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=mask)
    if not RMS:
        centre = tl.sum(value, 1) / dim
        tl.store(mean + r, centre, mask=r < rows)
        value = tl.where(mask, value - centre[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / dim + eps)
    tl.store(rstd + r, inverse, mask=r < rows)
    out = value * inverse[:, None] * tl.load(weight + d, mask=d < dim, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    dy, dtotal, total, weight, mean, rstd, dx, dresidual, dweight, dbias, rows, dim, steps,
    RMS: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dresidual = dtotal + d norm / d total · dy in float32, dx the same rounded (if ROUNDED); dweight and dbias are
    partial sums (programs, D) over the program's steps · ROWS rows."""
    d = tl.arange(0, BLOCK_D)
    d_mask = d < dim
    scale = tl.load(weight + d, mask=d_mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(0, steps):
        r = (tl.program_id(0).to(tl.int64) * steps + i) * ROWS + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & d_mask[None, :]
        at = r[:, None] * dim + d[None, :]
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + r, mask=r < rows, other=0.0)
        if not RMS:
            value = tl.where(mask, value - tl.load(mean + r, mask=r < rows, other=0.0)[:, None], 0.0)
        normed = value * inverse[:, None]
        sum_weight += tl.sum(grad * normed, 0)
        if dbias is not None:
            sum_bias += tl.sum(grad, 0)
        scaled = grad * scale[None, :]
        out = scaled - normed * (tl.sum(scaled * normed, 1) / dim)[:, None]
        if not RMS:
            out -= (tl.sum(scaled, 1) / dim)[:, None]
        out = out * inverse[:, None]
        if dtotal is not None:
            out += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual + at, out, mask=mask)
        if ROUNDED:
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * dim + d, sum_weight, mask=d_mask)
    if dbias is not None:
        tl.store(dbias + tl.program_id(0) * dim + d, sum_bias, mask=d_mask)
