"""Mixers: everything between in_proj and out_proj."""

from mamba_ssm_vim.ops.mixer.op import Direction, bimamba_inner, mixer

__all__ = ["Direction", "bimamba_inner", "mixer"]
