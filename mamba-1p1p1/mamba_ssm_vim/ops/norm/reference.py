"""Residual add followed by RMSNorm or LayerNorm in plain PyTorch: the specification."""

from typing import NamedTuple

import torch
from causal_conv1d_vim.runtime.autodiff import gradients


class NormGradients(NamedTuple):
    """The gradient of each input by its name; that of the residual is float32, that of x before it is rounded."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def why_not(x: torch.Tensor) -> str | None:
    """The reference serves every device and dtype."""
    return None


def add_norm_ref(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = True,
    residual_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual' = x + residual; y = norm(residual') * weight + bias over the last dimension.

    RMSNorm: r / sqrt(mean(r²) + eps) (arXiv 1910.07467); LayerNorm: (r - mean) / sqrt(var + eps) (arXiv 1607.06450).

    Args:
        x: (..., D).
        residual: (..., D) or None (counts as zero).
        weight: (D,).
        bias: (D,) or None.
        eps: added to the mean square or variance.
        rms: RMSNorm if true, else LayerNorm.
        residual_dtype: dtype of the returned residual; None keeps residual's, or x's if there is none.

    Returns:
        y (..., D) in x's dtype; residual' (..., D). The norm is taken of the float32 sum before it is rounded.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    total = x.to(compute)
    if residual is not None:
        total = total + residual.to(compute)
    centred = total if rms else total - total.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype), total.to(residual_dtype)


def forward(x, residual, weight, bias, *, eps, rms, residual_dtype):
    """`add_norm_ref` under the signature that backends share: (y, residual', mean, rstd)."""
    y, residual_out = add_norm_ref(x, residual, weight, bias, eps=eps, rms=rms, residual_dtype=residual_dtype)
    total = residual_out.to(torch.promote_types(x.dtype, torch.float32))
    mean = None if rms else total.mean(-1)
    centred = total if rms else total - mean.unsqueeze(-1)
    return y, residual_out, mean, torch.rsqrt(centred.square().mean(-1) + eps)


def backward(dy, dresidual_out, residual_out, weight, bias, mean, rstd, *, rms, x_dtype):
    """The gradients by differentiating the reference."""

    def normed(total, weight, bias):
        centred = total if rms else total - total.mean(-1, keepdim=True)
        # rstd is 1 / sqrt(variance + eps), so eps is variance's complement and need not be passed on.
        variance = centred.square().mean(-1, keepdim=True)
        eps = (rstd.unsqueeze(-1).pow(-2) - variance).detach()
        y = centred * torch.rsqrt(variance + eps) * weight
        return y if bias is None else y + bias

    compute = torch.promote_types(residual_out.dtype, torch.float32)
    dtotal, dweight, dbias = gradients(
        normed,
        (residual_out.to(compute), weight.to(compute), None if bias is None else bias.to(compute)),
        (dy.to(compute),),
    )
    if dresidual_out is not None:
        dtotal = dtotal + dresidual_out.to(compute)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return NormGradients(dtotal.to(x_dtype), dtotal, dweight.to(weight.dtype), dbias)
