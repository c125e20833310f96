"""Depthwise causal convolution in Triton, on NVIDIA and AMD GPUs; on CPU tensors under TRITON_INTERPRET=1 if forced."""

import math

import torch

from causal_conv1d_vim.conv.reference import ConvGradients
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.tensors import cast_like
from causal_conv1d_vim.runtime.triton import guard, interpreting, tokens

MAX_WIDTH = 8
TILE_T = 16
BLOCK_E = 128


def why_not(x: torch.Tensor, weight: torch.Tensor | None = None) -> str | None:
    """None if these kernels can serve a call on x (B, L, E) and weight (E, W), else the reason."""
    if weight is not None and weight.shape[1] > MAX_WIDTH:
        return f"the width is {weight.shape[1]}, more than {MAX_WIDTH}"
    return triton_runtime.why_not(x)


def _launch(x: torch.Tensor, weight: torch.Tensor) -> tuple[tuple[int, int], dict]:
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"the convolution's width is {weight.shape[1]}; the Triton kernels take 1 to {MAX_WIDTH}")
    tile = TILE_T if not interpreting() else 8
    batch, seqlen, dim = x.shape
    grid = (batch * math.ceil(seqlen / tile), math.ceil(dim / BLOCK_E))
    return grid, {"W": weight.shape[1], "TILE_T": tile, "BLOCK_E": BLOCK_E, "num_warps": 4, "num_stages": 1}


def _inputs(x, weight, bias, initial_state):
    return *tokens(x), *(None if t is None else t.contiguous() for t in (weight, bias, initial_state))


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> torch.Tensor:
    """(B, L, E) → (B, L, E); weight (E, W), bias (E,), initial_state (B, W-1, E). See `causal_conv1d`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    from causal_conv1d_vim.conv import triton_kernels as kernels

    grid, meta = _launch(x, weight)
    inputs = _inputs(x, weight, bias, initial_state)
    with guard(x):
        kernels.conv_forward[grid](*inputs, *tokens(out), *x.shape[1:], SILU=silu, REVERSE=reverse, **meta)
    return out


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    silu: bool,
    reverse: bool,
    out: ConvGradients = ConvGradients(),
    accumulate: bool = False,
) -> ConvGradients:
    """The gradients by name, each in its input's dtype.

    Args:
        out: only `x` may be given: (B, L, E), channel stride 1.
        accumulate: add to `out.x` instead of overwriting it.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out.x is None else out.x
    if x.numel() == 0:
        return ConvGradients(dx, *(None if t is None else torch.zeros_like(t) for t in (weight, bias, initial_state)))
    from causal_conv1d_vim.conv import triton_kernels as kernels

    grid, meta = _launch(x, weight)
    inputs = _inputs(x, weight, bias, initial_state)
    dweight = torch.empty(grid[0], weight.shape[1], x.shape[2], dtype=torch.float32, device=x.device)
    dbias = torch.empty(grid[0], x.shape[2], dtype=torch.float32, device=x.device)
    dstate = None if initial_state is None else torch.empty_like(inputs[-1])
    with guard(x):
        kernels.conv_backward[grid](
            *tokens(dout), *inputs, *tokens(dx), dstate, dweight, dbias, *x.shape[1:],
            SILU=silu, REVERSE=reverse, ADD=accumulate, **meta,
        )  # fmt: skip
    return ConvGradients(
        dx, cast_like(dweight.sum(0).t(), weight), cast_like(dbias.sum(0), bias), cast_like(dstate, initial_state)
    )
