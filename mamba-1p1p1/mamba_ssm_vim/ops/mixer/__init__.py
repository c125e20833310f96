"""Mixers: everything between in_proj and out_proj."""

from mamba_ssm_vim.ops.mixer.op import bimamba_inner, mixer
from mamba_ssm_vim.ops.mixer.reference import Direction, mixer_ref

__all__ = ["Direction", "bimamba_inner", "mixer", "mixer_ref"]
