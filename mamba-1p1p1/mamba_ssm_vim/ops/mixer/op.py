"""The mixer between in_proj and out_proj: convolution, projections and scan, in one or two directions.

Legend: B batch, L tokens, E inner channels, N states, R rank of dt, W convolution width.
"""

import torch
from causal_conv1d_vim.runtime.autodiff import dispatched, forbid_double_backward, recording
from causal_conv1d_vim.runtime.backend import Backend
from causal_conv1d_vim.runtime.operators import check
from causal_conv1d_vim.runtime.registry import OpBackends

from mamba_ssm_vim.ops.mixer.reference import FIELDS, Direction, calls_modules, mixer_ref, projections_in_own_dtype

backends = OpBackends("mixer", "mamba_ssm_vim.ops.mixer")


def _fused(xz: torch.Tensor, directions: list[Direction], tensors: list[torch.Tensor | None]) -> Backend | None:
    """The first backend with a fused mixer that can serve the call; None leaves it to the operators one by one."""
    return None if dispatched((xz,), tensors) else backends.fused(xz, directions)


_TENSORS = tuple(name for name in FIELDS if name != "reverse")


class _FusedMixer(torch.autograd.Function):
    """A backend's fused mixer; the tensors of the directions are passed flat, in the order of `_TENSORS`."""

    @staticmethod
    def forward(ctx, module, xz, scale, reverses, *tensors):
        directions = _FusedMixer._directions(reverses, tensors)
        out, saved = module.forward(xz, directions, scale=scale, save=True)
        ctx.module, ctx.scale, ctx.reverses = module, scale, reverses
        ctx.save_for_backward(xz, *tensors, *saved)
        return out

    @staticmethod
    def backward(ctx, dout):
        forbid_double_backward("mixer")
        xz, *rest = ctx.saved_tensors
        count = len(ctx.reverses) * len(_TENSORS)
        directions = _FusedMixer._directions(ctx.reverses, rest[:count])
        dxz, grads = ctx.module.backward(dout, xz, directions, rest[count:], scale=ctx.scale)
        flat = [
            None if value is None or (grad := grads[i].get(name)) is None else grad.to(value.dtype)
            for i, direction in enumerate(directions)
            for name in _TENSORS
            for value in (getattr(direction, name),)
        ]
        return None, dxz, None, None, *flat

    @staticmethod
    def _directions(reverses, tensors):
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
    _check(xz, directions)
    tensors = [getattr(direction, name) for direction in directions for name in _TENSORS]
    if (module := _fused(xz, directions, tensors)) is not None:
        with projections_in_own_dtype(xz, directions):
            if recording(xz, *tensors):
                return _FusedMixer.apply(module, xz, scale, tuple(d.reverse for d in directions), *tensors)
            return module.forward(xz, directions, scale=scale, save=False)[0]
    return mixer_ref(xz, directions, scale=scale)


def bimamba_inner(xz: torch.Tensor, forward: Direction, backward: Direction, *, divide: bool = True) -> torch.Tensor:
    """The bidirectional mixer "v2": parameters for each direction, summed, and halved if `divide`. See `mixer`."""
    return mixer(xz, [forward, backward], scale=0.5 if divide else 1.0)
