"""Residual add and norm under the published names, with the argument order of mamba_ssm 1."""

import torch

from mamba_ssm_vim.ops.norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm_vim.ops.norm.linear import LayerNormLinearFn, layer_norm_linear_fn
from mamba_ssm_vim.ops.norm.reference import add_norm_ref

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]


class LayerNormFn:
    """`layer_norm_fn` under the published name of its autograd function, for code that calls `apply`."""

    apply = staticmethod(layer_norm_fn)


def _reference(name: str, rms: bool):
    """A published reference, whose signature both norms share."""

    def ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        eps: float = 1e-6,
        prenorm: bool = False,
        upcast: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
        y, total = add_norm_ref(x, residual, weight, bias, eps=eps, rms=rms, residual_dtype=dtype)
        return (y, total) if prenorm else y

    ref.__name__ = ref.__qualname__ = name
    ref.__doc__ = f"""`{name.removesuffix("ref")}fn` in plain PyTorch: y, and with `prenorm` the sum.

    The sum is float32 if `upcast`, else in x's dtype; the arithmetic is float32 either way.
    """
    return ref


layer_norm_ref = _reference("layer_norm_ref", rms=False)
rms_norm_ref = _reference("rms_norm_ref", rms=True)
