"""Depthwise causal convolution."""

from causal_conv1d_vim.conv.op import backends, causal_conv1d
from causal_conv1d_vim.conv.reference import causal_conv1d_ref

__all__ = ["backends", "causal_conv1d", "causal_conv1d_ref"]
