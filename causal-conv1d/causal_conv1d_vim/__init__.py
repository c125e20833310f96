"""Depthwise causal convolution: reference, CPU, Triton and CUDA backends under one torch operator.

`causal_conv1d` is token-major, (batch, seqlen, dim); the published functions are channel-first, (batch, dim, seqlen).
"""

from causal_conv1d_vim.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from causal_conv1d_vim.causal_conv1d_varlen import causal_conv1d_varlen_states
from causal_conv1d_vim.conv import causal_conv1d
from causal_conv1d_vim.runtime.backend import BACKENDS, BackendError, use_backend

__all__ = [
    "BACKENDS",
    "BackendError",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "use_backend",
]
