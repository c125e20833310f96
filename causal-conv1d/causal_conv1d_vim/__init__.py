"""Depthwise causal convolution."""
