"""Residual add and norm as one torch operator, and the published functions on top of it."""

import torch
from causal_conv1d_vim.runtime.autodiff import dispatched, forbid_double_backward, recording
from causal_conv1d_vim.runtime.operators import check, check_dtype, register
from causal_conv1d_vim.runtime.registry import OpBackends

from mamba_ssm_vim.ops.norm import onnx

backends = OpBackends("add_norm", "mamba_ssm_vim.ops.norm")


def check_arguments(x, residual, weight, bias, residual_dtype) -> None:
    """Raise for what the kernels must not meet."""
    shape, of_weight = x.shape, weight.shape
    if not shape or of_weight != shape[-1:] or not shape[-1]:
        raise ValueError(
            "x must be (..., dim) with at least one channel and weight must be (dim,), got "
            f"{tuple(shape)} and {tuple(of_weight)}"
        )
    check((("x", x, None), ("residual", residual, shape), ("weight", weight, None), ("bias", bias, of_weight)),
          activations=("residual",))  # fmt: skip
    if residual_dtype is not x.dtype:
        check_dtype("residual_dtype", residual_dtype)


def _run(x, residual, weight, bias, eps, rms, residual_dtype):
    backend = backends.module(backends.pick(x))
    return backend, *backend.forward(x, residual, weight, bias, eps=eps, rms=rms, residual_dtype=residual_dtype)


def _own(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it shares memory with `other`, which what a registered operator returns may not."""
    return tensor.clone() if tensor.data_ptr() == other.data_ptr() else tensor


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    residual_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_arguments(x, residual, weight, bias, residual_dtype)
    _, y, residual_out, mean, rstd = _run(x, residual, weight, bias, eps, rms, residual_dtype)
    residual_out = _own(residual_out, x)
    return y, residual_out, rstd.new_empty(0) if mean is None else mean, rstd


def _forward_shapes(x, residual, weight, bias, eps, rms, residual_dtype):
    check_arguments(x, residual, weight, bias, residual_dtype)
    statistics = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=residual_dtype),
        statistics.new_empty(0) if rms else statistics.clone(),
        statistics,
    )


def _check_backward(dy, dresidual_out, residual_out, weight, bias, mean, rstd, rms, x_dtype) -> None:
    check_arguments(dy, dresidual_out, weight, bias, x_dtype)
    rows = dy.shape[:-1]
    check((("dy", dy, None), ("residual_out", residual_out, dy.shape), ("mean", mean, (0,) if rms else rows),
           ("rstd", rstd, rows)), activations=("residual_out", "rstd"))  # fmt: skip


def _backward(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
    x_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_backward(dy, dresidual_out, residual_out, weight, bias, mean, rstd, rms, x_dtype)
    backend = backends.module(backends.pick(dy))
    # As `_forward` gives them; a caller's own may be others.
    compute = torch.promote_types(residual_out.dtype, torch.float32)
    mean, rstd = (t.to(compute).contiguous() for t in (mean, rstd))
    dx, dresidual, dweight, dbias = backend.backward(
        dy, dresidual_out, residual_out, weight, bias, None if rms else mean, rstd, rms=rms, x_dtype=x_dtype
    )
    return dx, _own(dresidual, dx), dweight, weight.new_empty(0) if dbias is None else dbias


def _backward_shapes(dy, dresidual_out, residual_out, weight, bias, mean, rstd, rms, x_dtype):
    _check_backward(dy, dresidual_out, residual_out, weight, bias, mean, rstd, rms, x_dtype)
    compute = torch.promote_types(residual_out.dtype, torch.float32)
    return (
        dy.new_empty(dy.shape, dtype=x_dtype),
        dy.new_empty(dy.shape, dtype=compute),
        torch.empty_like(weight),
        weight.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.rms, _ = inputs
    _, residual_out, mean, rstd = output
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(residual_out, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _vjp(ctx, dy, dresidual_out, _dmean, _drstd):
    residual_out, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dresidual, dweight, dbias = _op_backward(
        dy, dresidual_out, residual_out, weight, bias, mean, rstd, ctx.rms, ctx.x_dtype
    )
    dresidual = None if ctx.residual_dtype is None else dresidual.to(ctx.residual_dtype)
    return dx, dresidual, dweight, None if bias is None else dbias, None, None, None


_op = register("add_norm", _forward, _forward_shapes, _setup_context, _vjp, onnx)
_op_backward = register("add_norm_backward", _backward, _backward_shapes)


class _AddNorm(torch.autograd.Function):
    """The eager path: the same backends without the dispatcher's overhead."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, rms, residual_dtype):
        ctx.backend, y, residual_out, mean, rstd = _run(x, residual, weight, bias, eps, rms, residual_dtype)
        ctx.rms, ctx.x_dtype, ctx.residual_dtype = rms, x.dtype, None if residual is None else residual.dtype
        ctx.save_for_backward(residual_out, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, residual_out

    @staticmethod
    def backward(ctx, dy, dresidual_out):
        forbid_double_backward("add_norm")
        residual_out, weight, bias, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros(residual_out.shape, dtype=ctx.x_dtype, device=residual_out.device)
        kept = residual_out, weight, bias
        if dispatched((dy,), (dresidual_out,)):
            mean = rstd.new_empty(0) if mean is None else mean
            grads = _op_backward(dy, dresidual_out, *kept, mean, rstd, ctx.rms, ctx.x_dtype)
        else:
            grads = ctx.backend.backward(dy, dresidual_out, *kept, mean, rstd, rms=ctx.rms, x_dtype=ctx.x_dtype)
        dx, dresidual, dweight, dbias = grads
        dresidual = None if ctx.residual_dtype is None else dresidual.to(ctx.residual_dtype)
        return dx, dresidual, dweight, None if bias is None else dbias, None, None, None


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = True,
    residual_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual stream and normalise the sum; see `add_norm_ref` for shapes and equations.

    Every tensor may be float32, bfloat16 or float16 and need not share its type with the others; the arithmetic is
    float32. The reference serves float64, which x and residual then both are.

    Returns:
        y (..., D) in x's dtype and the new residual (..., D) in `residual_dtype`.

    Raises:
        ValueError: shapes or types that do not fit, or tensors on different devices.
    """
    if residual_dtype is None:
        residual_dtype = (x if residual is None else residual).dtype
    if dispatched((x, weight), (residual, bias)):
        return _op(x, residual, weight, bias, eps, rms, residual_dtype)[:2]
    check_arguments(x, residual, weight, bias, residual_dtype)
    if recording(x, residual, weight, bias):
        return _AddNorm.apply(x, residual, weight, bias, eps, rms, residual_dtype)
    return _run(x, residual, weight, bias, eps, rms, residual_dtype)[1:3]


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Published signature: y, and with `prenorm` also the new residual."""
    residual_dtype = torch.float32 if residual is None and residual_in_fp32 else None
    y, residual_out = add_norm(x, residual, weight, bias, eps=eps, rms=is_rms_norm, residual_dtype=residual_dtype)
    return (y, residual_out) if prenorm else y


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm_fn` with RMSNorm."""
    return layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)
