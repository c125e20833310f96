"""The causal convolution for ONNX's exporters."""

import torch

from causal_conv1d_vim.conv.reference import causal_conv1d_ref
from causal_conv1d_vim.runtime.onnx import Graph


def decomposition(x, weight, bias, initial_state, silu, reverse) -> torch.Tensor:
    """The operator in torch's own, for `torch.onnx.export(dynamo=True)`."""
    return causal_conv1d_ref(x, weight, bias, initial_state, silu=silu, reverse=reverse)


def symbolic(context, x, weight, bias, initial_state, silu, reverse):
    """The operator in ONNX's, for `torch.onnx.export(dynamo=False)`."""
    g = Graph(context)
    dim, width = g.sizes(weight)
    taps, inputs = g.float32(weight), g.float32(x)
    if reverse:
        taps = g.flip(taps, 1)
    before = (0, width - 1) if reverse else (width - 1, 0)
    if g.given(initial_state):
        past = g.float32(initial_state)
        # Oldest first in the order of the scan, which from the last token to the first is the other way round.
        parts = (inputs, g.flip(past, 1)) if reverse else (past, inputs)
        inputs, before = g.op("Concat", *parts, axis_i=1), (0, 0)
    arguments = [g.transpose(inputs, 0, 2, 1), g.reshape(taps, dim, 1, width)]
    if g.given(bias):
        arguments.append(g.float32(bias))
    out = g.op("Conv", *arguments, group_i=dim, kernel_shape_i=[width], pads_i=before)
    out = g.transpose(g.silu(out) if silu else out, 0, 2, 1)
    return g.like(out, x)
