"""Causal depthwise convolution as a torch operator: registration, autograd and the public token-major function."""

import torch

from causal_conv1d_vim.conv import onnx
from causal_conv1d_vim.runtime.autodiff import dispatched, forbid_double_backward, recording
from causal_conv1d_vim.runtime.operators import check, register
from causal_conv1d_vim.runtime.registry import OpBackends

backends = OpBackends("causal_conv1d", "causal_conv1d_vim.conv")

ACTIVATIONS = (None, "silu", "swish")


def check_arguments(x, weight, bias, initial_state) -> None:
    """Raise for what the kernels must not meet."""
    shape, taps = x.shape, weight.shape
    if len(shape) != 3 or len(taps) != 2 or taps[0] != shape[2] or not taps[0] or not taps[1]:
        raise ValueError(
            "x must be (batch, seqlen, dim) and weight (dim, width), of at least one channel and one tap, got "
            f"{tuple(shape)} and {tuple(taps)}"
        )
    batch, _, dim = shape
    check(
        (("x", x, None), ("weight", weight, None), ("bias", bias, (dim,)),
         ("initial_state", initial_state, (batch, taps[1] - 1, dim)))
    )  # fmt: skip


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    silu: bool,
    reverse: bool,
) -> torch.Tensor:
    check_arguments(x, weight, bias, initial_state)
    backend = backends.module(backends.pick(x, weight))
    # A backend may keep x's layout; a graph is promised one.
    return backend.forward(x, weight, bias, initial_state, silu=silu, reverse=reverse).contiguous()


def _forward_shapes(x, weight, bias, initial_state, silu, reverse):
    check_arguments(x, weight, bias, initial_state)
    return x.new_empty(x.shape)


def _check_backward(dout, x, weight, bias, initial_state) -> None:
    check_arguments(x, weight, bias, initial_state)
    check((("x", x, None), ("dout", dout, x.shape)), activations=("dout",))


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_backward(dout, x, weight, bias, initial_state)
    backend = backends.module(backends.pick(x, weight))
    grads = backend.backward(dout, x, weight, bias, initial_state, silu=silu, reverse=reverse)
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in grads)


def _backward_shapes(dout, x, weight, bias, initial_state, silu, reverse):
    _check_backward(dout, x, weight, bias, initial_state)
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, weight, bias, initial_state)
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, initial_state, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias, initial_state)


def _vjp(ctx, dout):
    saved = ctx.saved_tensors
    grads = _op_backward(dout, *saved, ctx.silu, ctx.reverse)
    return *(None if t is None else g for t, g in zip(saved, grads, strict=True)), None, None


_op = register("causal_conv1d", _forward, _forward_shapes, _setup_context, _vjp, onnx)
_op_backward = register("causal_conv1d_backward", _backward, _backward_shapes)


class _CausalConv1d(torch.autograd.Function):
    """The eager path: the same backends without the dispatcher's overhead."""

    @staticmethod
    def forward(ctx, backend, x, weight, bias, initial_state, silu, reverse):
        _setup_context(ctx, (x, weight, bias, initial_state, silu, reverse), None)
        ctx.backend = backend
        return backend.forward(x, weight, bias, initial_state, silu=silu, reverse=reverse)

    @staticmethod
    def backward(ctx, dout):
        forbid_double_backward("causal_conv1d")
        if dispatched((dout,)):
            return None, *_vjp(ctx, dout)
        grads = ctx.backend.backward(dout, *ctx.saved_tensors, silu=ctx.silu, reverse=ctx.reverse)
        return None, *grads, None, None


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """Depthwise causal convolution over tokens (section 3.4 of arXiv 2312.00752), token-major.

    Args:
        x: (B, L, E), float32, bfloat16 or float16 (float64 with the reference); the other tensors may each have another
            of these types.
        weight: (E, W); the CPU takes W up to 16, Triton up to 8, CUDA 2 to 4, the reference any.
        bias: (E,) or None.
        activation: None, "silu" or "swish" (the same).
        initial_state: (B, W-1, E), tokens before the first in scan order, oldest first; None means zeros.
        reverse: convolve from the last token to the first.

    Returns:
        (B, L, E) in x's dtype; the arithmetic is float32.

    Raises:
        ValueError: unknown activation, shapes or types that do not fit, or tensors on different devices.
        BackendError: a forced backend cannot run this call.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected None, 'silu' or 'swish'")
    tensors = (x, weight, bias, initial_state)
    if dispatched(tensors[:2], tensors[2:]):
        return _op(*tensors, activation is not None, reverse)
    check_arguments(*tensors)
    backend = backends.module(backends.pick(x, weight))
    if recording(*tensors):
        return _CausalConv1d.apply(backend, *tensors, activation is not None, reverse)
    return backend.forward(*tensors, silu=activation is not None, reverse=reverse)
