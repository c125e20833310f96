"""Kernels and modules of Mamba-1, bidirectional included, and its language model.

`selective_scan`, `mixer` and `bimamba_inner` are token-major, (batch, seqlen, dim); the published functions, whose
names end in `_fn` and `_ref`, are channel-first, (batch, dim, seqlen).
"""

from causal_conv1d_vim.runtime.backend import BACKENDS, BackendError, use_backend

from mamba_ssm_vim.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm_vim.modules.mamba_simple import Mamba
from mamba_ssm_vim.ops.mixer import Direction, bimamba_inner, mixer
from mamba_ssm_vim.ops.norm import RMSNorm, add_norm, layer_norm_fn, rms_norm_fn
from mamba_ssm_vim.ops.selective_scan import selective_scan
from mamba_ssm_vim.ops.selective_scan_interface import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm_vim.ops.state_update import selective_state_update

__all__ = [
    "BACKENDS",
    "BackendError",
    "Direction",
    "Mamba",
    "MambaLMHeadModel",
    "RMSNorm",
    "add_norm",
    "bimamba_inner",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "layer_norm_fn",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "mixer",
    "rms_norm_fn",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "use_backend",
]
