"""Selective scan as a torch operator: registration, autograd and the public token-major function."""

import torch
from causal_conv1d_vim.runtime.autodiff import dispatched, forbid_double_backward, recording
from causal_conv1d_vim.runtime.operators import check, register
from causal_conv1d_vim.runtime.registry import OpBackends

from mamba_ssm_vim.ops.selective_scan import onnx

backends = OpBackends("selective_scan", "mamba_ssm_vim.ops.selective_scan")

_Optional = torch.Tensor | None


def check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state) -> None:
    """Raise for what the kernels must not meet."""
    shape, of_a = u.shape, A.shape
    if len(shape) != 3 or delta.shape != shape or not shape[2]:
        raise ValueError(
            "u and delta must both be (batch, seqlen, dim) with at least one channel, got "
            f"{tuple(shape)} and {tuple(delta.shape)}"
        )
    batch, seqlen, dim = shape
    if len(of_a) != 2 or of_a[0] != dim or not of_a[1]:
        raise ValueError(f"A must be (dim, dstate) with dim {dim} and at least one state, got {tuple(of_a)}")
    for name, t in (("B", B), ("C", C)):
        size = t.shape
        if len(size) == 4:
            fits = size[0] == batch and size[1] == seqlen and size[3] == of_a[1] and size[2] and not dim % size[2]
        else:
            fits = size == of_a
        if not fits:
            raise ValueError(
                f"{name} must be (batch, seqlen, groups, dstate) or (dim, dstate), got {tuple(size)} "
                f"for u {tuple(shape)} and A {tuple(of_a)}"
            )
    check(
        (("u", u, None), ("delta", delta, None), ("A", A, None), ("B", B, None), ("C", C, None), ("D", D, (dim,)),
         ("z", z, shape), ("delta_bias", delta_bias, (dim,)), ("initial_state", initial_state, (batch, dim, of_a[1]))),
        activations=("delta", "z"),
        may_be_complex=("A", "B", "C", "initial_state") if A.dtype.is_complex else (),
    )  # fmt: skip


def _forward(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: _Optional, z: _Optional,
    delta_bias: _Optional, initial_state: _Optional, delta_softplus: bool, reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    backend = backends.module(backends.pick(u, A, B, C))
    out, last_state, _ = backend.forward(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus=delta_softplus, reverse=reverse, save=False
    )
    return out, last_state


def _state_dtype(u: torch.Tensor, A: torch.Tensor) -> torch.dtype:
    return torch.promote_types(A.dtype, torch.promote_types(u.dtype, torch.float32))


def _forward_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    last_state = u.new_empty((u.shape[0], u.shape[2], A.shape[1]), dtype=_state_dtype(u, A))
    return u.new_empty(u.shape), last_state


def _check_backward(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state) -> None:
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    state = (u.shape[0], *A.shape)
    check(
        (("u", u, None), ("dout", dout, u.shape), ("dlast_state", dlast_state, state)),
        activations=("dout",),
        may_be_complex=("dlast_state",) if A.dtype.is_complex else (),
    )  # fmt: skip


def _backward(
    dout: torch.Tensor, dlast_state: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor,
    B: torch.Tensor, C: torch.Tensor, D: _Optional, z: _Optional, delta_bias: _Optional, initial_state: _Optional,
    delta_softplus: bool, reverse: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    _check_backward(dout, dlast_state, *inputs)
    backend = backends.module(backends.pick(u, A, B, C))
    flags = {"delta_softplus": delta_softplus, "reverse": reverse}
    # Between its forward and backward operators a graph keeps no chunk states: they are recomputed.
    _, _, saved = backend.forward(*inputs, **flags, save=True)
    grads = backend.backward(dout, dlast_state, *inputs, saved, **flags, out_scale=1.0)
    return tuple(u.new_empty(0) if g is None else g.contiguous() for g in grads)


def _backward_shapes(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    _check_backward(dout, dlast_state, *inputs)
    return tuple(
        u.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _vjp(ctx, dout, dlast_state):
    saved = ctx.saved_tensors
    grads = _op_backward(dout, dlast_state, *saved, ctx.delta_softplus, ctx.reverse)
    return *(None if t is None else g for t, g in zip(saved, grads, strict=True)), None, None


_op = register("selective_scan", _forward, _forward_shapes, _setup_context, _vjp, onnx)
_op_backward = register("selective_scan_backward", _backward, _backward_shapes)


class _SelectiveScan(torch.autograd.Function):
    """The eager path: the same backends without the dispatcher's overhead, chunk states kept for backward."""

    @staticmethod
    def forward(ctx, backend, delta_softplus, reverse, *inputs):
        out, last_state, saved = backend.forward(*inputs, delta_softplus=delta_softplus, reverse=reverse, save=True)
        ctx.backend, ctx.delta_softplus, ctx.reverse = backend, delta_softplus, reverse
        ctx.save_for_backward(*inputs, *saved)
        ctx.set_materialize_grads(False)
        return out, last_state

    @staticmethod
    def backward(ctx, dout, dlast_state):
        forbid_double_backward("selective_scan")
        # Read once: recomputed activations (gradient checkpointing) are handed out a single time.
        tensors = ctx.saved_tensors
        inputs, saved = tensors[:9], list(tensors[9:])
        if dout is None:
            dout = torch.zeros_like(inputs[0])
        if dispatched((dout,), (dlast_state,)):
            if dlast_state is None:
                u, A = inputs[0], inputs[2]
                dlast_state = u.new_zeros((u.shape[0], *A.shape), dtype=_state_dtype(u, A))
            grads = _op_backward(dout, dlast_state, *inputs, ctx.delta_softplus, ctx.reverse)
            return None, None, None, *(None if t is None else g for t, g in zip(inputs, grads, strict=True))
        grads = ctx.backend.backward(
            dout, dlast_state, *inputs, saved, delta_softplus=ctx.delta_softplus, reverse=ctx.reverse, out_scale=1.0
        )
        return None, None, None, *grads


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective state-space scan (algorithm 2 of arXiv 2312.00752), token-major.

    Shapes and meaning are those of `selective_scan_ref`. Every tensor may be float32, bfloat16 or float16 and need not
    share its type with the others; arithmetic and state are float32. Differentiable once in every tensor. The reference
    serves float64 (u, delta and z are then all of it) and complex A, with which B, C and the state may be complex.

    Returns:
        out (B, L, E) in u's dtype, and with `return_last_state` also the state (B, E, N) after the last step.

    Raises:
        ValueError: shapes or types that do not fit, tensors on different devices, or u float64 and delta or z not.
        BackendError: a forced backend cannot run this call.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if dispatched(tensors[:5], tensors[5:]):
        out, last_state = _op(*tensors, delta_softplus, reverse)
        return (out, last_state) if return_last_state else out
    check_arguments(*tensors)
    backend = backends.module(backends.pick(u, A, B, C))
    if recording(*tensors):
        out, last_state = _SelectiveScan.apply(backend, delta_softplus, reverse, *tensors)
    else:
        out, last_state, _ = backend.forward(*tensors, delta_softplus=delta_softplus, reverse=reverse)
    return (out, last_state) if return_last_state else out
