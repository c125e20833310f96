"""A norm followed by a linear layer under the published names; two operators."""

import torch
import torch.nn.functional as F

from mamba_ssm_vim.ops.norm.op import layer_norm_fn


def layer_norm_linear_fn(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """linear(norm(x + residual)), and with `prenorm` also the sum.

    Args:
        x: (..., D).
        norm_weight: (D,).
        norm_bias: (D,) or None.
        linear_weight: (out, D).
        linear_bias: (out,) or None.
        residual: (..., D) or None.
        eps: added to the mean square or variance.
        prenorm: also return the sum, in residual's dtype, else float32 if `residual_in_fp32`, else x's.
        residual_in_fp32: see `prenorm`.
        is_rms_norm: RMSNorm instead of LayerNorm.

    Returns:
        (..., out) in the dtype of `linear_weight`, or autocast's; a tuple with the sum (..., D) if `prenorm`.

    Raises:
        ValueError: shapes or types of the norm that do not fit.
    """
    y, total = layer_norm_fn(x, norm_weight, norm_bias, residual, eps, True, residual_in_fp32, is_rms_norm)
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


class LayerNormLinearFn:
    """`layer_norm_linear_fn` under the published name of its autograd function."""

    apply = staticmethod(layer_norm_linear_fn)
