"""Triton kernel of one step of the selective scan, the state updated in place."""

import triton
import triton.language as tl
from causal_conv1d_vim.runtime.triton_kernels import sigmoid, softplus


@triton.jit
def state_update(
    state, x, dt, A, B, C, D, z, dt_bias, out, channels, dstate, groups,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """h = exp(dt A) h + dt B x, out = (C h + D x) SiLU(z); state (B, E, N), x, dt, z, out (B, E), B and C (B, G, N)."""
    batch = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, N)
    e_mask = e < channels
    mask = e_mask[:, None] & (n < dstate)[None, :]
    at = batch * channels + e
    step = tl.load(dt + at, mask=e_mask, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    value = tl.load(x + at, mask=e_mask, other=0.0).to(tl.float32)
    row = (batch * groups + e // (channels // groups)) * dstate
    b = tl.load(B + row[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(C + row[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    decay = tl.load(A + e[:, None].to(tl.int64) * dstate + n[None, :], mask=mask, other=0.0).to(tl.float32)
    place = state + at[:, None] * dstate + n[None, :]
    h = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    h = tl.exp(step[:, None] * decay) * h + (step * value)[:, None] * b
    tl.store(place, h.to(state.dtype.element_ty), mask=mask)
    y = tl.sum(h * c, 1)
    if D is not None:
        y += tl.load(D + e, mask=e_mask, other=0.0).to(tl.float32) * value
    if z is not None:
        gate = tl.load(z + at, mask=e_mask, other=0.0).to(tl.float32)
        y = y * gate * sigmoid(gate)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=e_mask)
