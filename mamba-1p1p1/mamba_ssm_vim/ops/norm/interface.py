"""Residual add and norm under the published names, with the argument order of mamba_ssm 2.

Over `layernorm.py` it adds a second branch (`x1`), a second norm of the same sum (`weight1`, `bias1`), a factor per row
and dropout. Those are composed of the operator and of torch's; without them this is the operator alone.
"""

from collections.abc import Callable

import torch
from torch import nn

from mamba_ssm_vim.ops.norm.op import add_norm, check_arguments
from mamba_ssm_vim.ops.norm.reference import add_norm_ref

_Optional = torch.Tensor | None
_Outputs = torch.Tensor | tuple[_Optional, ...]


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: _Optional,
    residual: _Optional = None,
    x1: _Optional = None,
    weight1: _Optional = None,
    bias1: _Optional = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: _Optional = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> _Outputs:
    """total = dropout(x * rowscale) + dropout(x1) + residual; y = norm(total) * weight + bias.

    Args:
        x: (..., D).
        weight: (D,).
        bias: (D,) or None.
        residual: (..., D) or None.
        x1: (..., D) or None, a second branch.
        weight1, bias1: (D,) or None, of a second norm of the same total.
        eps: added to the mean square or variance.
        dropout_p: probability of zeroing an element of x and of x1, whether or not anything is being trained.
        rowscale: (...) or None, a factor per row of x; not together with `x1`.
        prenorm: also return the total, in residual's dtype, else float32 if `residual_in_fp32`, else x's.
        residual_in_fp32: see `prenorm`.
        is_rms_norm: RMSNorm instead of LayerNorm.
        return_dropout_mask: also return the masks (true where kept) of x and x1, None where there is no dropout.

    Returns:
        y, or a tuple of y, of y1 if there is a `weight1`, of the total if `prenorm`, and of the two masks if asked for.

    Raises:
        ValueError: `rowscale` together with `x1`, `bias1` without `weight1`, or shapes that do not fit.
    """
    mask, mask1 = _draw_masks(x, x1, dropout_p)
    if residual is not None:
        dtype = residual.dtype
    else:
        dtype = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
    outputs = _norms(
        add_norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, mask, mask1, dtype,
        is_rms_norm,
    )  # fmt: skip
    if return_dropout_mask:
        return (*outputs, mask, mask1)
    return outputs if len(outputs) > 1 else outputs[0]


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: _Optional,
    residual: _Optional = None,
    x1: _Optional = None,
    weight1: _Optional = None,
    bias1: _Optional = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: _Optional = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> _Outputs:
    """`layer_norm_fn` with RMSNorm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def _reference(name: str, rms: bool):
    """A published reference, whose signature both norms share."""

    def ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: _Optional,
        residual: _Optional = None,
        x1: _Optional = None,
        weight1: _Optional = None,
        bias1: _Optional = None,
        eps: float = 1e-6,
        dropout_p: float = 0.0,
        rowscale: _Optional = None,
        prenorm: bool = False,
        dropout_mask: _Optional = None,
        dropout_mask1: _Optional = None,
        upcast: bool = False,
    ) -> _Outputs:
        drawn, drawn1 = _draw_masks(x, x1, dropout_p)
        dtype = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
        outputs = _norms(
            add_norm_ref, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
            drawn if dropout_mask is None else dropout_mask, drawn1 if dropout_mask1 is None else dropout_mask1, dtype,
            rms,
        )  # fmt: skip
        return outputs if len(outputs) > 1 else outputs[0]

    ref.__name__ = ref.__qualname__ = name
    ref.__doc__ = f"""`{name.removesuffix("ref")}fn` in plain PyTorch, with given dropout masks or new ones.

    The total that `prenorm` returns is float32 if `upcast`, else in x's dtype; the arithmetic is float32 either way.
    """
    return ref


layer_norm_ref = _reference("layer_norm_ref", rms=False)
rms_norm_ref = _reference("rms_norm_ref", rms=True)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, optionally with dropout and the residual add before it.

    Args:
        hidden_size: width D of the last dimension.
        eps: added to the mean square.
        dropout_p: probability of zeroing an element of the input while training.

    Raises:
        ValueError: `dropout_p` is no probability below 1. (It comes third, as in release 2; name `device` and `dtype`.)
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_probability(dropout_p)
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight to ones."""
        nn.init.ones_(self.weight)

    @torch.jit.unused  # its result is one tensor or two, which TorchScript has no type for
    def forward(
        self, x: torch.Tensor, residual: _Optional = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> _Outputs:
        """x (..., D) → y (..., D), and with `prenorm` also the new residual."""
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def _check_probability(dropout_p: float) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p!r}, expected at least 0 and less than 1")


def _draw_masks(x: torch.Tensor, x1: _Optional, dropout_p: float) -> tuple[_Optional, _Optional]:
    _check_probability(dropout_p)
    if dropout_p == 0.0:
        return None, None
    return tuple(
        None if t is None else torch.rand(t.shape, dtype=torch.float32, device=t.device) >= dropout_p for t in (x, x1)
    )


def _norms(
    norm: Callable, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, mask, mask1,
    residual_dtype, rms,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(y, [y1,] [total]); `norm` is the operator or its reference."""
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale cannot be combined with x1: scale x beforehand")
    if bias1 is not None and weight1 is None:
        raise ValueError("bias1 needs weight1")
    if x1 is not None and x1.shape != x.shape:
        raise ValueError(f"x1 must be {tuple(x.shape)}, got {tuple(x1.shape)}")
    if rowscale is not None and rowscale.shape != x.shape[:-1]:
        raise ValueError(f"rowscale must be {tuple(x.shape[:-1])}, got {tuple(rowscale.shape)}")

    check_arguments(x, residual, weight, bias, residual_dtype)
    dtype = x.dtype
    if rowscale is not None or dropout_p > 0.0 or x1 is not None:
        # In float32 until the norm has been taken, as if everything were one kernel.
        compute = torch.promote_types(dtype, torch.float32)

        def dropped(t, keep):
            return t if dropout_p == 0.0 else t.where(keep, 0.0) / (1.0 - dropout_p)

        x = x.to(compute) if rowscale is None else x.to(compute) * rowscale.to(compute).unsqueeze(-1)
        x = dropped(x, mask)
        if x1 is not None:
            x = x + dropped(x1.to(compute), mask1)
    y, total = norm(x, residual, weight, bias, eps=eps, rms=rms, residual_dtype=residual_dtype)
    outputs = [y.to(dtype)]
    if weight1 is not None:
        outputs.append(norm(x, residual, weight1, bias1, eps=eps, rms=rms, residual_dtype=residual_dtype)[0].to(dtype))
    return (*outputs, total) if prenorm else tuple(outputs)
