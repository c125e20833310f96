"""Residual add and norm for ONNX's exporters."""

import torch
from causal_conv1d_vim.runtime.onnx import Graph

from mamba_ssm_vim.ops.norm import reference


def decomposition(x, residual, weight, bias, eps, rms, residual_dtype) -> tuple[torch.Tensor, ...]:
    """The operator in torch's own, for `torch.onnx.export(dynamo=True)`."""
    y, total, mean, rstd = reference.forward(x, residual, weight, bias, eps=eps, rms=rms, residual_dtype=residual_dtype)
    return y, total.clone() if total is x else total, rstd.new_empty(0) if mean is None else mean, rstd


def symbolic(context, x, residual, weight, bias, eps, rms, residual_dtype):
    """The operator in ONNX's, for `torch.onnx.export(dynamo=False)`; the sum is returned in float32."""
    g = Graph(context)
    total = g.float32(x)
    if g.given(residual):
        total = g.op("Add", total, g.float32(residual))
    (dim,) = g.sizes(weight)
    mean = g.mean(total, dim)
    centred = total if rms else g.op("Sub", total, mean)
    variance = g.op("Add", g.mean(g.op("Mul", centred, centred), dim), g.number(float(eps)))
    deviation = g.op("Sqrt", variance)
    y = g.op("Mul", g.op("Div", centred, deviation), g.float32(weight))
    if g.given(bias):
        y = g.op("Add", y, g.float32(bias))
    last = g.ints(-1)
    return g.like(y, x), total, g.op("Squeeze", mean, last), g.op("Reciprocal", g.op("Squeeze", deviation, last))
