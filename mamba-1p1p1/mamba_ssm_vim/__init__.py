"""Kernels and modules of Mamba-1, bidirectional included."""

from causal_conv1d_vim.backend import BACKENDS, BackendError, use_backend

from mamba_ssm_vim.modules.mamba_simple import Mamba
from mamba_ssm_vim.ops.mixer import Direction, bimamba_inner, mixer
from mamba_ssm_vim.ops.norm import RMSNorm, add_norm, layer_norm_fn, rms_norm_fn
from mamba_ssm_vim.ops.selective_scan import selective_scan, selective_scan_ref

__all__ = [
    "BACKENDS",
    "BackendError",
    "Direction",
    "Mamba",
    "RMSNorm",
    "add_norm",
    "bimamba_inner",
    "layer_norm_fn",
    "mixer",
    "rms_norm_fn",
    "selective_scan",
    "selective_scan_ref",
    "use_backend",
]
