"""Residual add with RMSNorm or LayerNorm."""

from mamba_ssm_vim.ops.norm.interface import RMSNorm
from mamba_ssm_vim.ops.norm.op import add_norm, backends, layer_norm_fn, rms_norm_fn
from mamba_ssm_vim.ops.norm.reference import add_norm_ref

__all__ = ["RMSNorm", "add_norm", "add_norm_ref", "backends", "layer_norm_fn", "rms_norm_fn"]
