"""Residual add and norm under the published import path, with the argument order of mamba_ssm 2."""

from mamba_ssm_vim.ops.norm.interface import RMSNorm, layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref
from mamba_ssm_vim.ops.norm.linear import LayerNormLinearFn, layer_norm_linear_fn

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
