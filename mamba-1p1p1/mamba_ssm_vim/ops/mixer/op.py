"""The mixer between in_proj and out_proj as a torch operator: convolution, projections and scan of every direction.

A compiled graph calls it as one operator. `torch.export`, traces, dispatch modes and transforms of `torch.func` see the
operators that it is composed of (`mixer_ref`).

Legend: B batch, L tokens, E inner channels, N states, R rank of dt, W convolution width.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from causal_conv1d_vim.runtime.autodiff import dispatched, forbid_double_backward, gradients, recording
from causal_conv1d_vim.runtime.backend import Backend, BackendError, forced_backend
from causal_conv1d_vim.runtime.operators import check, register_composed
from causal_conv1d_vim.runtime.registry import OpBackends
from torch.utils._python_dispatch import _disable_current_modes

from mamba_ssm_vim.ops.mixer.reference import FIELDS, Direction, calls_modules, mixer_ref, projections_in_own_dtype

backends = OpBackends("mixer", "mamba_ssm_vim.ops.mixer")

# Operators and autograd functions get the tensors of all directions flat, in this order.
_TENSORS = tuple(name for name in FIELDS if name != "reverse")
_OPTIONAL = ("conv_bias", "A_back")
_whole = False


@contextlib.contextmanager
def kept_whole() -> Iterator[None]:
    """While it lasts, a graph that `torch.export` makes without gradients has one node for a mixer.

    That is for runtimes that have the operator too. Graphs that are made elsewhere at the same time get it as well.
    """
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def _flat(directions: list[Direction]) -> list[torch.Tensor | None]:
    return [getattr(direction, name) for direction in directions for name in _TENSORS]


def _directions(tensors: Sequence[torch.Tensor | None], reverses: Sequence[bool]) -> list[Direction]:
    rows = (tensors[i : i + len(_TENSORS)] for i in range(0, len(tensors), len(_TENSORS)))
    return [
        Direction(**dict(zip(_TENSORS, row, strict=True)), reverse=reverse)
        for row, reverse in zip(rows, reverses, strict=True)
    ]


def _check(xz: torch.Tensor, directions: list[Direction]) -> None:
    """Raise for shapes that do not fit: kernels get bare addresses."""
    if xz.dim() != 3 or xz.shape[2] % 2 or not directions:
        raise ValueError(
            f"xz must be (batch, seqlen, 2 * dim) with at least one direction, got {tuple(xz.shape)} and "
            f"{len(directions)} directions"
        )
    dim = xz.shape[2] // 2
    for p in directions:
        sizes = [(name, tuple(getattr(p, name).shape)) for name in ("conv_weight", "dt_proj_weight", "A")]
        for name, size in sizes:
            if len(size) != 2 or 0 in size:
                raise ValueError(f"{name} must have two dimensions, neither of them 0, got {size}")
        (_, width), (_, rank), (_, states) = (size for _, size in sizes)
        check(
            (("xz", xz, None), ("conv_weight", p.conv_weight, (dim, width)), ("conv_bias", p.conv_bias, (dim,)),
             ("x_proj_weight", p.x_proj_weight, (rank + 2 * states, dim)), ("dt_bias", p.dt_bias, (dim,)),
             ("dt_proj_weight", p.dt_proj_weight, (dim, rank)), ("A", p.A, (dim, states)), ("D", p.D, (dim,)),
             ("A_back", p.A_back, (dim, states)))
        )  # fmt: skip


def _checked(xz: torch.Tensor, tensors: Sequence[torch.Tensor | None], reverses: Sequence[bool]) -> list[Direction]:
    """The directions of a call of a registered operator, which anybody may call with anything."""
    if len(tensors) != len(reverses) * len(_TENSORS):
        raise ValueError(
            f"a mixer takes {len(_TENSORS)} tensors per direction ({', '.join(_TENSORS)}), got {len(tensors)} for "
            f"{len(reverses)} directions"
        )
    for index, t in enumerate(tensors):
        name = _TENSORS[index % len(_TENSORS)]
        if t is None and name not in _OPTIONAL:
            raise ValueError(f"{name} must be a tensor, got None")
        if t is not None and t.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got the layout {str(t.layout).removeprefix('torch.')}")
    directions = _directions(tensors, reverses)
    _check(xz, directions)
    return directions


def _forward(
    xz: torch.Tensor, tensors: Sequence[torch.Tensor | None], reverses: Sequence[bool], scale: float
) -> torch.Tensor:
    directions = _checked(xz, tensors, reverses)
    with torch.no_grad():
        return _run(xz, directions, scale)


def _forward_shape(xz, tensors, reverses, scale):
    _checked(xz, tensors, reverses)
    return xz.new_empty((*xz.shape[:2], xz.shape[2] // 2))


def _forward_saving(
    xz: torch.Tensor, tensors: Sequence[torch.Tensor | None], reverses: Sequence[bool], scale: float, backend: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    directions = _checked(xz, tensors, reverses)
    module = _recorded_backend(backend, xz, directions)
    with torch.no_grad(), projections_in_own_dtype(xz, directions):
        return module.forward(xz, directions, scale=scale, save=True)


def _forward_saving_shapes(xz, tensors, reverses, scale, backend):
    shapes = backends.module(backend).saved_shapes(xz, _checked(xz, tensors, reverses))
    saved = [xz.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return _forward_shape(xz, tensors, reverses, scale), saved


def _check_backward(dout, xz, tensors, saved, reverses, backend) -> list[Direction]:
    directions = _checked(xz, tensors, reverses)
    check((("xz", xz, None), ("dout", dout, (*xz.shape[:2], xz.shape[2] // 2))))
    expected = backends.module(backend).saved_shapes(xz, directions)
    if (found := [(tuple(t.shape), t.dtype) for t in saved]) != expected:
        raise ValueError(f"saved must be what mixer_saving gave, {expected}, got {found}")
    return directions


def _backward(
    dout: torch.Tensor, xz: torch.Tensor, tensors: Sequence[torch.Tensor | None], saved: Sequence[torch.Tensor],
    reverses: Sequence[bool], scale: float, backend: str,
) -> list[torch.Tensor]:  # fmt: skip
    directions = _check_backward(dout, xz, tensors, saved, reverses, backend)
    module = _recorded_backend(backend, xz, directions)
    with projections_in_own_dtype(xz, directions):
        dxz, grads = module.backward(dout, xz, directions, saved, scale=scale)
    return [dxz, *(g.contiguous() for g in _in_their_dtypes(directions, grads) if g is not None)]


def _backward_shapes(dout, xz, tensors, saved, reverses, scale, backend):
    _checked(xz, tensors, reverses)
    return [t.new_empty(t.shape) for t in (xz, *tensors) if t is not None]


def _recorded_backend(name: str, xz: torch.Tensor, directions: list[Direction]) -> Backend:
    """The backend that a graph was made for: another one saves other tensors."""
    if forced_backend() not in (None, name):
        raise BackendError(
            f"backend {forced_backend()!r} is forced, but this graph was compiled for {name!r}: compile it anew, for "
            "which torch.compiler.reset() discards what is compiled"
        )
    module = backends.module(name)
    if (reason := module.why_not(xz, directions)) is not None:
        raise BackendError(f"backend {name!r} cannot run mixer: {reason}")
    return module


def _name(backend: Backend) -> str:
    return backend.__name__.rpartition(".")[2]


def _in_their_dtypes(directions: list[Direction], grads: list[dict]) -> list[torch.Tensor | None]:
    """The gradients that a backend found, flat, each in the dtype of its tensor."""
    return [
        None if value is None or (grad := found.get(name)) is None else grad.to(value.dtype)
        for direction, found in zip(directions, grads, strict=True)
        for name in _TENSORS
        for value in (getattr(direction, name),)
    ]


def _composition(xz, tensors, reverses, scale):
    return mixer_ref(xz, _directions(tensors, reverses), scale=scale)


def _autograd(xz, tensors, reverses, scale):
    if not recording(xz, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return _op(xz, tensors, reverses, scale)
    directions = _checked(xz, tensors, reverses)
    with _disable_current_modes():  # a backend may try out the device when it is first asked
        backend = backends.fused(xz, directions)
    if backend is None:
        return mixer_ref(xz, directions, scale=scale)
    return _FusedMixer.apply(backend, True, xz, scale, tuple(reverses), *tensors)


_op = register_composed("mixer", _forward, _forward_shape, _autograd, _composition)
_op_saving = register_composed("mixer_saving", _forward_saving, _forward_saving_shapes)
_op_backward = register_composed("mixer_backward", _backward, _backward_shapes)


class _FusedMixer(torch.autograd.Function):
    """A backend's fused mixer: called directly, or as operators of a graph that is being made."""

    @staticmethod
    def forward(ctx, backend, in_graph, xz, scale, reverses, *tensors):
        if in_graph:
            with torch._C._AutoDispatchBelowAutograd():
                out, saved = _op_saving(xz, tensors, reverses, scale, _name(backend))
        else:
            out, saved = backend.forward(xz, _directions(tensors, reverses), scale=scale, save=True)
        ctx.backend, ctx.in_graph, ctx.scale, ctx.reverses = backend, in_graph, scale, reverses
        ctx.save_for_backward(xz, *tensors, *saved)
        return out

    @staticmethod
    def backward(ctx, dout):
        forbid_double_backward("mixer")
        xz, *rest = ctx.saved_tensors
        count = len(ctx.reverses) * len(_TENSORS)
        tensors, saved = rest[:count], rest[count:]
        if ctx.in_graph:
            found = iter(_op_backward(dout, xz, tensors, saved, ctx.reverses, ctx.scale, _name(ctx.backend)))
            grads = [None if t is None else next(found) for t in (xz, *tensors)]
        elif dispatched((dout,)):  # by vmap, for example: the operators inside have rules for it
            grads = gradients(
                lambda xz, *tensors: _composition(xz, tensors, ctx.reverses, ctx.scale), (xz, *tensors), (dout,)
            )
        else:
            directions = _directions(tensors, ctx.reverses)
            dxz, found = ctx.backend.backward(dout, xz, directions, saved, scale=ctx.scale)
            grads = [dxz, *_in_their_dtypes(directions, found)]
        return None, None, grads[0], None, None, *grads[1:]


def _run(xz: torch.Tensor, directions: list[Direction], scale: float) -> torch.Tensor:
    """By a fused kernel, or operator by operator where no backend has one."""
    backend = backends.fused(xz, directions)
    if backend is None:
        return mixer_ref(xz, directions, scale=scale)
    tensors = _flat(directions)
    with projections_in_own_dtype(xz, directions):
        if recording(xz, *tensors):
            return _FusedMixer.apply(backend, False, xz, scale, tuple(d.reverse for d in directions), *tensors)
        return backend.forward(xz, directions, scale=scale, save=False)[0]


def mixer(xz: torch.Tensor, directions: list[Direction], *, scale: float = 1.0) -> torch.Tensor:
    """Sum over directions of the gated selective scan of the convolved input, times `scale` (algorithm 1 of Vim).

    Args:
        xz: (B, L, 2E), the output of in_proj: x in the first E channels, the gate z in the last.
        directions: one or two passes; their outputs are added.
        scale: factor of the sum; Vim halves it.

    xz and the parameters may each be float32, bfloat16 or float16.

    Returns:
        (B, L, E) in xz's dtype, the input of out_proj.

    Raises:
        ValueError: shapes or types that do not fit, or tensors on different devices.
    """
    if calls_modules(directions):
        return mixer_ref(xz, directions, scale=scale)
    tensors = _flat(directions)
    if not dispatched((xz,), tensors):
        _check(xz, directions)
        return _run(xz, directions, scale)
    # `torch.compiler.is_exporting()` answers True in every compiled graph of torch 2.11, so its flag is read instead.
    if torch.compiler.is_compiling() and (_whole or not torch.compiler._is_exporting_flag):
        return _op(xz, tensors, [direction.reverse for direction in directions], scale)
    _check(xz, directions)
    return mixer_ref(xz, directions, scale=scale)


def bimamba_inner(xz: torch.Tensor, forward: Direction, backward: Direction, *, divide: bool = True) -> torch.Tensor:
    """The bidirectional mixer "v2": parameters for each direction, summed, and halved if `divide`. See `mixer`."""
    return mixer(xz, [forward, backward], scale=0.5 if divide else 1.0)
