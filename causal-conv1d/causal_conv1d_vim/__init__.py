"""Depthwise causal convolution: reference, CPU, Triton and CUDA backends under one torch operator."""

from causal_conv1d_vim.backend import BACKENDS, BackendError, use_backend
from causal_conv1d_vim.conv import causal_conv1d, causal_conv1d_ref

__all__ = ["BACKENDS", "BackendError", "causal_conv1d", "causal_conv1d_ref", "use_backend"]
