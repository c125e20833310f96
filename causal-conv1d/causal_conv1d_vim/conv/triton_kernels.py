"""Triton kernels of the depthwise causal convolution.

A program owns TILE_T steps of BLOCK_E channels of one sequence. Steps are numbered in scan order; with REVERSE step s
is token L-1-s. The window is re-read from the cache once per tap rather than kept: each tap is one shifted load.
"""

import triton
import triton.language as tl


@triton.jit
def probe(out, SIZE: tl.constexpr):
    """Ones: shows that kernels can be built and launched."""
    tl.store(out + tl.arange(0, SIZE), tl.full((SIZE,), 1.0, tl.float32))


@triton.jit
def _place(seqlen, dim, TILE_T: tl.constexpr, BLOCK_E: tl.constexpr):
    tiles = tl.cdiv(seqlen, TILE_T)
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    return pid, batch, (pid % tiles) * TILE_T + tl.arange(0, TILE_T), e, e < dim


@triton.jit
def _tap(
    x,
    state,
    batch,
    s,
    e,
    e_mask,
    x_b,
    x_t,
    seqlen,
    dim,
    HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
):
    """x at steps s (TILE_T,), which may lie before the first: there the initial state (B, W-1, E), or zero."""
    t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
    inside = ((s >= 0) & (s < seqlen))[:, None] & e_mask[None, :]
    value = tl.load(x + batch * x_b + t[:, None] * x_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_STATE:
        before = (s < 0)[:, None] & e_mask[None, :]
        row = batch * (W - 1) + s + (W - 1)
        value += tl.load(state + row[:, None] * dim + e[None, :], mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _window_sum(x, weight, bias, state, batch, s, e, e_mask, x_b, x_t, seqlen, dim,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr,
    TILE_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((TILE_T, BLOCK_E), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + e, mask=e_mask, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        tap = tl.load(weight + e * W + w, mask=e_mask, other=0.0).to(tl.float32)
        acc += tap[None, :] * _tap(
            x, state, batch, s + (w - W + 1), e, e_mask, x_b, x_t, seqlen, dim, HAS_STATE, REVERSE, W
        )
    return acc


@triton.jit
def conv_forward(
    x, weight, bias, state, out, x_b, x_t, out_b, out_t, seqlen, dim,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr,
    TILE_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out (B, L, E) = act(bias + window · weight)."""
    _, batch, s, e, e_mask = _place(seqlen, dim, TILE_T, BLOCK_E)
    acc = _window_sum(
        x,
        weight,
        bias,
        state,
        batch,
        s,
        e,
        e_mask,
        x_b,
        x_t,
        seqlen,
        dim,
        HAS_BIAS,
        HAS_STATE,
        REVERSE,
        W,
        TILE_T,
        BLOCK_E,
    )
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
    inside = (s < seqlen)[:, None] & e_mask[None, :]
    tl.store(out + batch * out_b + t[:, None] * out_t + e[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grad_sum(
    dout, x, weight, bias, state, batch, s, e, e_mask, dout_b, dout_t, x_b, x_t, seqlen, dim,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr,
    TILE_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum before the activation at steps s, zero outside the sequence."""
    t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
    inside = ((s >= 0) & (s < seqlen))[:, None] & e_mask[None, :]
    grad = tl.load(dout + batch * dout_b + t[:, None] * dout_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
    if SILU:
        acc = _window_sum(
            x, weight, bias, state, batch, s, e, e_mask, x_b, x_t, seqlen, dim, HAS_BIAS, HAS_STATE, REVERSE, W, TILE_T,
            BLOCK_E,
        )  # fmt: skip
        sigma = 1.0 / (1.0 + tl.exp(-acc))
        grad = grad * sigma * (1.0 + acc * (1.0 - sigma))
    return grad


@triton.jit
def conv_backward(
    dout, x, weight, bias, state, dx, dstate, dweight, dbias,
    dout_b, dout_t, x_b, x_t, dx_b, dx_t, seqlen, dim,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr,
    W: tl.constexpr, TILE_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx (B, L, E), and per program partial sums dweight (programs, W, E), dbias (programs, E) in float32.

    The sums before the activation are made again for each of the W steps that a token reaches.
    """
    pid, batch, s, e, e_mask = _place(seqlen, dim, TILE_T, BLOCK_E)
    acc = tl.zeros((TILE_T, BLOCK_E), tl.float32)
    for w in tl.static_range(W):
        grad = _grad_sum(
            dout, x, weight, bias, state, batch, s + (W - 1 - w), e, e_mask, dout_b, dout_t, x_b, x_t, seqlen, dim,
            HAS_BIAS, HAS_STATE, SILU, REVERSE, W, TILE_T, BLOCK_E,
        )  # fmt: skip
        acc += grad * tl.load(weight + e * W + w, mask=e_mask, other=0.0).to(tl.float32)[None, :]
        if w == W - 1:
            # Here grad belongs to the program's own steps.
            tl.store(dbias + pid.to(tl.int64) * dim + e, tl.sum(grad, 0), mask=e_mask)
            for v in tl.static_range(W):
                tap = _tap(x, state, batch, s + (v - W + 1), e, e_mask, x_b, x_t, seqlen, dim, HAS_STATE, REVERSE, W)
                tl.store(dweight + (pid.to(tl.int64) * W + v) * dim + e, tl.sum(grad * tap, 0), mask=e_mask)
    t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
    inside = (s < seqlen)[:, None] & e_mask[None, :]
    at = dx + batch * dx_b + t[:, None] * dx_t + e[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, acc.to(dx.dtype.element_ty), mask=inside)
    if HAS_STATE:  # noqa: SIM102 - decided when the kernel is compiled, the inner one when it runs
        if pid % tl.cdiv(seqlen, TILE_T) == 0:
            # Step j - (W - 1) of the state reaches steps 0 .. j through taps w = j - step.
            for j in tl.static_range(W - 1):
                total = tl.zeros((TILE_T, BLOCK_E), tl.float32)
                tap = tl.load(
                    weight + e[None, :] * W + (j - s)[:, None], mask=(s <= j)[:, None] & e_mask[None, :], other=0.0
                ).to(tl.float32)
                total += tap * _grad_sum(
                    dout, x, weight, bias, state, batch, s, e, e_mask, dout_b, dout_t, x_b, x_t, seqlen, dim,
                    HAS_BIAS, HAS_STATE, SILU, REVERSE, W, TILE_T, BLOCK_E,
                )  # fmt: skip
                row = batch * (W - 1) + j
                tl.store(dstate + row * dim + e, tl.sum(total, 0).to(dstate.dtype.element_ty), mask=e_mask)
