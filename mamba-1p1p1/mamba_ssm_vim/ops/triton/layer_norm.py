"""Residual add and norm under the published import path, with the argument order of mamba_ssm 2."""

from mamba_ssm_vim.ops.norm.interface import RMSNorm, layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"]
