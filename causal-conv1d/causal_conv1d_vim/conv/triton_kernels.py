"""Triton kernels of the depthwise causal convolution.

A program owns TILE_T steps of BLOCK_E channels of one sequence. Steps are numbered in scan order; with REVERSE step s
is token L-1-s. The window is re-read from the cache once per tap rather than kept: each tap is one shifted load.
Tensors that may be absent are None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from causal_conv1d_vim.runtime.triton_kernels import sigmoid


class Inputs(NamedTuple):
    """x (B, L, E) with its strides, weight (E, W), bias (E,) or None, state (B, W-1, E) or None."""

    x: Any
    x_b: Any
    x_t: Any
    weight: Any
    bias: Any
    state: Any
    seqlen: Any
    dim: Any


class Block(NamedTuple):
    """Where a program works."""

    pid: Any
    batch: Any
    s: Any  # (TILE_T,) steps
    e: Any  # (BLOCK_E,) channels
    e_mask: Any
    first: Any  # whether s starts at the first step


@triton.jit
def _block(inputs, TILE_T: tl.constexpr, BLOCK_E: tl.constexpr):
    tiles = tl.cdiv(inputs.seqlen, TILE_T)
    pid = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = (pid % tiles) * TILE_T + tl.arange(0, TILE_T)
    return Block(
        pid=pid.to(tl.int64), batch=(pid // tiles).to(tl.int64), s=s, e=e, e_mask=e < inputs.dim, first=pid % tiles == 0
    )


@triton.jit
def _at(x, x_b, x_t, inputs, block, s, REVERSE: tl.constexpr):
    """Addresses of steps s in x (B, L, E)."""
    t = (inputs.seqlen - 1 - s if REVERSE else s).to(tl.int64)
    return x + block.batch * x_b + t[:, None] * x_t + block.e[None, :]


@triton.jit
def _inside(inputs, block, s):
    return ((s >= 0) & (s < inputs.seqlen))[:, None] & block.e_mask[None, :]


@triton.jit
def _load(x, x_b, x_t, inputs, block, s, REVERSE: tl.constexpr):
    """x at steps s, zero outside the sequence."""
    at = _at(x, x_b, x_t, inputs, block, s, REVERSE)
    return tl.load(at, mask=_inside(inputs, block, s), other=0.0).to(tl.float32)


@triton.jit
def _store(x, x_b, x_t, value, inputs, block, REVERSE: tl.constexpr):
    at = _at(x, x_b, x_t, inputs, block, block.s, REVERSE)
    tl.store(at, value.to(x.dtype.element_ty), mask=_inside(inputs, block, block.s))


@triton.jit
def _input(inputs, block, s, REVERSE: tl.constexpr, W: tl.constexpr):
    """x at steps s (TILE_T,), which may lie before the first: there the initial state (B, W-1, E), or zero."""
    value = _load(inputs.x, inputs.x_b, inputs.x_t, inputs, block, s, REVERSE)
    if inputs.state is not None:
        before = (s < 0)[:, None] & block.e_mask[None, :]
        row = block.batch * (W - 1) + s + (W - 1)
        at = inputs.state + row[:, None] * inputs.dim + block.e[None, :]
        value += tl.load(at, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _tap(inputs, block, w, W: tl.constexpr):
    return tl.load(inputs.weight + block.e * W + w, mask=block.e_mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _window_sum(inputs, block, s, REVERSE: tl.constexpr, W: tl.constexpr, TILE_T: tl.constexpr, BLOCK_E: tl.constexpr):
    acc = tl.zeros((TILE_T, BLOCK_E), tl.float32)
    if inputs.bias is not None:
        acc += tl.load(inputs.bias + block.e, mask=block.e_mask, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        acc += _tap(inputs, block, w, W) * _input(inputs, block, s + (w - W + 1), REVERSE, W)
    return acc


@triton.jit
def conv_forward(
    x, x_b, x_t, weight, bias, state, out, out_b, out_t, seqlen, dim,
    SILU: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr, TILE_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out (B, L, E) = act(bias + window · weight)."""
    inputs = Inputs(x=x, x_b=x_b, x_t=x_t, weight=weight, bias=bias, state=state, seqlen=seqlen, dim=dim)
    block = _block(inputs, TILE_T, BLOCK_E)
    acc = _window_sum(inputs, block, block.s, REVERSE, W, TILE_T, BLOCK_E)
    if SILU:
        acc = acc * sigmoid(acc)
    _store(out, out_b, out_t, acc, inputs, block, REVERSE)


@triton.jit
def _grad_sum(
    dout, dout_b, dout_t, inputs, block, s, SILU: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr,
    TILE_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum before the activation at steps s, zero outside the sequence."""
    grad = _load(dout, dout_b, dout_t, inputs, block, s, REVERSE)
    if SILU:
        acc = _window_sum(inputs, block, s, REVERSE, W, TILE_T, BLOCK_E)
        sigma = sigmoid(acc)
        grad = grad * sigma * (1.0 + acc * (1.0 - sigma))
    return grad


@triton.jit
def conv_backward(
    dout, dout_b, dout_t, x, x_b, x_t, weight, bias, state, dx, dx_b, dx_t, dstate, dweight, dbias, seqlen, dim,
    SILU: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr,
    W: tl.constexpr, TILE_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx (B, L, E), and per program partial sums dweight (programs, W, E), dbias (programs, E) in float32.

    The sums before the activation are recomputed for each of the W steps that a token reaches.
    """
    inputs = Inputs(x=x, x_b=x_b, x_t=x_t, weight=weight, bias=bias, state=state, seqlen=seqlen, dim=dim)
    block = _block(inputs, TILE_T, BLOCK_E)
    acc = tl.zeros((TILE_T, BLOCK_E), tl.float32)
    for w in tl.static_range(W):
        grad = _grad_sum(dout, dout_b, dout_t, inputs, block, block.s + (W - 1 - w), SILU, REVERSE, W, TILE_T, BLOCK_E)
        acc += grad * _tap(inputs, block, w, W)
        if w == W - 1:
            # For the last tap `grad` belongs to the program's own steps.
            tl.store(dbias + block.pid * inputs.dim + block.e, tl.sum(grad, 0), mask=block.e_mask)
            for v in tl.static_range(W):
                product = grad * _input(inputs, block, block.s + (v - W + 1), REVERSE, W)
                at = dweight + (block.pid * W + v) * inputs.dim + block.e
                tl.store(at, tl.sum(product, 0), mask=block.e_mask)
    if ADD:
        acc += _load(dx, dx_b, dx_t, inputs, block, block.s, REVERSE)
    _store(dx, dx_b, dx_t, acc, inputs, block, REVERSE)
    if dstate is not None:  # noqa: SIM102 - decided when the kernel is compiled, the inner one when it runs
        if block.first:
            # Step j - (W - 1) of the state reaches steps 0 .. j through taps w = j - step.
            for j in tl.static_range(W - 1):
                weights = inputs.weight + block.e[None, :] * W + (j - block.s)[:, None]
                tap = tl.load(weights, mask=(block.s <= j)[:, None] & block.e_mask[None, :], other=0.0).to(tl.float32)
                total = tap * _grad_sum(dout, dout_b, dout_t, inputs, block, block.s, SILU, REVERSE, W, TILE_T, BLOCK_E)
                row = dstate + (block.batch * (W - 1) + j) * inputs.dim + block.e
                tl.store(row, tl.sum(total, 0).to(dstate.dtype.element_ty), mask=block.e_mask)
