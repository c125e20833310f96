"""Causal depthwise convolution in plain PyTorch: the specification that every backend is tested against."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from causal_conv1d_vim.runtime.autodiff import gradients


class ConvGradients(NamedTuple):
    """The gradient of each input by its name, None where the input is None.

    As the argument `out` of a backend's `backward` it says where to write: None stands for a new tensor.
    """

    x: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    initial_state: torch.Tensor | None = None


def why_not(x: torch.Tensor, weight: torch.Tensor | None = None) -> str | None:
    """The reference serves every device, dtype and width."""
    return None


def causal_conv1d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    silu: bool = False,
    reverse: bool = False,
) -> torch.Tensor:
    """out_t = act(bias + sum_w weight[:, w] x_{t-(W-1)+w}); with `reverse` from the last token to the first.

    Args:
        x: (B, L, E), any floating dtype.
        weight: (E, W).
        bias: (E,) or None.
        initial_state: (B, W-1, E), the tokens before the first in scan order, oldest first; None means zeros.
        silu: apply SiLU to the result.
        reverse: anti-causal, i.e. flip(conv(flip(x))).

    Returns:
        (B, L, E) in x's dtype; the arithmetic is float32, or float64 if x is.
    """
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    x_c = x.to(compute)
    if reverse:
        x_c = x_c.flip(1)
    if initial_state is None:
        past = x_c.new_zeros(batch, width - 1, dim)
    else:
        past = initial_state.to(compute)
    padded = torch.cat([past, x_c], dim=1)
    out = sum(padded[:, w : w + seqlen] * weight[:, w].to(compute) for w in range(width))
    if bias is not None:
        out = out + bias.to(compute)
    if silu:
        out = F.silu(out)
    if reverse:
        out = out.flip(1)
    return out.to(x.dtype)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> torch.Tensor:
    """`causal_conv1d_ref` under the signature that backends share."""
    return causal_conv1d_ref(x, weight, bias, initial_state, silu=silu, reverse=reverse)


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> ConvGradients:
    """The gradients by differentiating the reference."""
    found = gradients(
        lambda *tensors: causal_conv1d_ref(*tensors, silu=silu, reverse=reverse),
        (x, weight, bias, initial_state),
        (dout,),
    )
    return ConvGradients(*found)
