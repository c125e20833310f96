"""Causal depthwise convolution as a torch operator: registration, autograd and the public token-major function."""

import torch

from causal_conv1d_vim.runtime.autodiff import dispatched, forbid_double_backward, recording
from causal_conv1d_vim.runtime.registry import OpBackends

backends = OpBackends("causal_conv1d", "causal_conv1d_vim.conv")

ACTIVATIONS = (None, "silu", "swish")


@torch.library.custom_op("vision_mamba::causal_conv1d", mutates_args=())
def _op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    silu: bool,
    reverse: bool,
) -> torch.Tensor:
    backend = backends.module(backends.pick(x, weight))
    # A backend may keep x's layout; a graph is promised one.
    return backend.forward(x, weight, bias, initial_state, silu=silu, reverse=reverse).contiguous()


@_op.register_fake
def _(x, weight, bias, initial_state, silu, reverse):
    return x.new_empty(x.shape)


@torch.library.custom_op("vision_mamba::causal_conv1d_backward", mutates_args=())
def _op_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = backends.module(backends.pick(x, weight))
    grads = backend.backward(dout, x, weight, bias, initial_state, silu=silu, reverse=reverse)
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in grads)


@_op_backward.register_fake
def _(dout, x, weight, bias, initial_state, silu, reverse):
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, weight, bias, initial_state)
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, initial_state, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias, initial_state)


def _op_vjp(ctx, dout):
    saved = ctx.saved_tensors
    grads = _op_backward(dout, *saved, ctx.silu, ctx.reverse)
    return *(None if t is None else g for t, g in zip(saved, grads, strict=True)), None, None


_op.register_autograd(_op_vjp, setup_context=_setup_context)


class _CausalConv1d(torch.autograd.Function):
    """The eager path: the same backends without the dispatcher's overhead."""

    @staticmethod
    def forward(ctx, backend, x, weight, bias, initial_state, silu, reverse):
        ctx.backend = backend
        ctx.silu, ctx.reverse = silu, reverse
        ctx.save_for_backward(x, weight, bias, initial_state)
        return ctx.backend.forward(x, weight, bias, initial_state, silu=silu, reverse=reverse)

    @staticmethod
    def backward(ctx, dout):
        forbid_double_backward("causal_conv1d")
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
        x: (B, L, E), float32, bfloat16 or float16 (float64 with the reference).
        weight: (E, W); the CPU takes W up to 16, Triton up to 8, CUDA 2 to 4, the reference any.
        bias: (E,) or None.
        activation: None, "silu" or "swish" (the same).
        initial_state: (B, W-1, E), tokens before the first in scan order, oldest first; None means zeros.
        reverse: convolve from the last token to the first.

    Returns:
        (B, L, E) in x's dtype; the arithmetic is float32.

    Raises:
        ValueError: unknown activation, shapes that do not fit, or tensors on different devices.
        BackendError: a forced backend cannot run this call.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected None, 'silu' or 'swish'")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x must be (batch, seqlen, dim) and weight (dim, width), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    batch, _, dim = x.shape
    past = (batch, weight.shape[1] - 1, dim)
    for name, t, expected in (("bias", bias, (dim,)), ("initial_state", initial_state, past), ("weight", weight, None)):
        if t is None:
            continue
        if expected is not None and t.shape != expected:
            raise ValueError(f"{name} must be {expected}, got {tuple(t.shape)}")
        if t.is_cpu is not x.is_cpu:
            raise ValueError(f"all tensors must be on one device: x is on {x.device}, {name} on {t.device}")
    if dispatched():
        return torch.ops.vision_mamba.causal_conv1d(x, weight, bias, initial_state, activation is not None, reverse)
    backend = backends.module(backends.pick(x, weight))
    if recording(x, weight, bias, initial_state):
        return _CausalConv1d.apply(backend, x, weight, bias, initial_state, activation is not None, reverse)
    return backend.forward(x, weight, bias, initial_state, silu=activation is not None, reverse=reverse)
