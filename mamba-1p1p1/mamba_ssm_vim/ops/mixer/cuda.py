"""The mixer on NVIDIA GPUs: both convolutions in one launch, batched projections, and one launch for both scans.

Forward: the two directions meet in the middle of the sequence, where their sum is scaled and gated. Backward keeps
the low-rank projections and the states before every 16th token, and recomputes the convolved input and the step.

Legend: S directions, B batch, L tokens, E inner channels, N states, R rank of dt, P its padding, K = R + P + 2N.
"""

import ctypes

import torch
from causal_conv1d_vim.conv import cuda as conv
from causal_conv1d_vim.conv.reference import ConvGradients
from causal_conv1d_vim.runtime.cuda_library import int32, int64, pointer
from causal_conv1d_vim.runtime.tensors import DTYPES, address

from mamba_ssm_vim.ops.selective_scan import cuda as scan
from mamba_ssm_vim.ops.selective_scan.reference import ScanGradients


class MixerWeightsArgs(ctypes.Structure):
    """`vim::MixerWeightsArgs` of csrc/cuda/mixer_weights.cu, field by field."""

    _fields_ = (
        *((name, pointer * 2) for name in ("x_proj", "dt_proj")),
        *((name, pointer) for name in ("x_out", "dt_out")),
        ("dim", int64),
        *((name, int32) for name in ("rank", "pad", "columns", "directions", "in_type", "out_type")),
    )


def why_not(xz: torch.Tensor, directions: list) -> str | None:
    """None if these kernels can serve the mixer of xz (B, L, 2E) along `directions`, else the reason."""
    if (reason := conv.why_not(xz) or scan.library.why_not(xz)) is not None:
        return reason
    if len(directions) > 2:
        return f"{len(directions)} directions are more than 2"
    if len(directions) == 2 and directions[0].reverse == directions[1].reverse:
        return "both directions run the same way"
    for direction in directions:
        if direction.A_back is not None:
            return "the directions share their parameters (v1)"
        if direction.A.shape[1] > scan.MAX_STATES:
            return f"{direction.A.shape[1]} states are more than {scan.MAX_STATES}"
        if not 2 <= direction.conv_weight.shape[1] <= 4:
            return f"the convolution's width is {direction.conv_weight.shape[1]}, not 2 to 4"
    if len({direction.A.shape[1] for direction in directions}) != 1:
        return "the directions have different numbers of states"
    if len({direction.conv_weight.shape[1] for direction in directions}) != 1:
        return "the directions have convolutions of different widths"
    if len({direction.dt_proj_weight.shape[1] for direction in directions}) != 1:
        return "the directions have steps of different ranks"
    return None


def _in_kernel_order(directions: list) -> list:
    """The directions in the order of the kernels for two: along the tokens, then against them."""
    return sorted(directions, key=lambda direction: direction.reverse)


def _convolved(x: torch.Tensor, ordered: list) -> torch.Tensor:
    """SiLU of each direction's convolution of x (B, L, E): (S, B, L, E); two directions share a launch."""
    if len(ordered) == 2:
        return conv.forward_pair(x, [w.conv_weight for w in ordered], [w.conv_bias for w in ordered])
    (one,) = ordered
    return conv.forward(x, one.conv_weight, one.conv_bias, None, silu=True, reverse=one.reverse).unsqueeze(0)


def _convolution_gradients(du_SBLE: torch.Tensor, x: torch.Tensor, ordered: list, dx: torch.Tensor) -> list[dict]:
    """Gradients of each direction's filter and bias; that of x goes to `dx`."""
    if len(ordered) == 2:
        weights, biases = conv.backward_pair(
            list(du_SBLE), x, [w.conv_weight for w in ordered], [w.conv_bias for w in ordered], dx
        )
    else:
        (direction,) = ordered
        found = conv.backward(
            du_SBLE[0], x, direction.conv_weight, direction.conv_bias, None, silu=True, reverse=direction.reverse,
            out=ConvGradients(x=dx),
        )  # fmt: skip
        weights, biases = [found.weight], [found.bias]
    return [{"conv_weight": w, "conv_bias": b} for w, b in zip(weights, biases, strict=True)]


def _weights(ordered: list, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x_proj's weights (S, K, E) and dt_proj's (S, E, R + P) in `dtype`.

    P zeros make the rank a multiple of 8, as fast 16-bit matrix products need their rows.
    """
    dim, rank = ordered[0].dt_proj_weight.shape
    columns = ordered[0].x_proj_weight.shape[0] - rank
    sources = [[w.x_proj_weight for w in ordered], [w.dt_proj_weight for w in ordered]]
    in_dtype = scan.common_dtype(*sources[0], *sources[1])
    if in_dtype not in DTYPES:
        in_dtype = torch.float32
    x_from, dt_from = ([t.to(in_dtype).contiguous() for t in tensors] for tensors in sources)
    pad = -rank % 8
    x_weights = torch.empty(len(ordered), rank + pad + columns, dim, dtype=dtype, device=x_from[0].device)
    dt_weights = torch.empty(len(ordered), dim, rank + pad, dtype=dtype, device=x_from[0].device)
    args = MixerWeightsArgs()
    for index in range(len(ordered)):
        args.x_proj[index], args.dt_proj[index] = address(x_from[index]), address(dt_from[index])
    args.x_out, args.dt_out, args.dim = address(x_weights), address(dt_weights), dim
    args.rank, args.pad, args.columns, args.directions = rank, pad, columns, len(ordered)
    args.in_type, args.out_type = DTYPES[in_dtype], DTYPES[dtype]
    scan.library.launch("vim_mixer_weights", args, x_weights)
    return x_weights, dt_weights


def _states_in_out(low_rank: torch.Tensor, dstate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B and C, (B, L, 1, N) column slices of a low-rank projection (B, L, K)."""
    B, C = low_rank[..., -2 * dstate :].unsqueeze(2).split(dstate, -1)
    return B, C


def saved_shapes(xz: torch.Tensor, directions: list) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `forward` saves."""
    batch, seqlen, width = xz.shape
    if batch * seqlen == 0:
        return []
    dim, (rank, dstate) = width // 2, (directions[0].dt_proj_weight.shape[1], directions[0].A.shape[1])
    low_rank = (len(directions), batch, seqlen, rank + -rank % 8 + 2 * dstate)
    states = [((scan.boundary_floats(batch, seqlen, dim, dstate),), torch.float32) for _ in directions]
    return [(low_rank, xz.dtype), *states, ((batch, seqlen, dim), xz.dtype)]


def forward(xz: torch.Tensor, directions: list, *, scale: float, save: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """xz (B, L, 2E) → out (B, L, E) = scale × Σ over directions of the gated scan; and what backward needs."""
    x, z = xz.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=xz.dtype, device=xz.device)
    if xz.numel() == 0:
        return out, []
    ordered, dstate = _in_kernel_order(directions), directions[0].A.shape[1]
    x_weights, dt_weights = _weights(ordered, xz.dtype)
    u_SBLE = _convolved(x, ordered)
    low_SMK = torch.bmm(u_SBLE.flatten(1, 2), x_weights.mT)
    delta_SBLE = torch.bmm(low_SMK[..., : dt_weights.shape[2]], dt_weights.mT).view(u_SBLE.shape)
    low_SBLK = low_SMK.view(*u_SBLE.shape[:3], -1)
    scans = []
    for direction, u, delta, low in zip(ordered, u_SBLE, delta_SBLE, low_SBLK, strict=True):
        B, C = _states_in_out(low, dstate)
        scans.append({
            "u": u, "delta": delta, "A": direction.A, "B": B, "C": C, "D": direction.D, "delta_bias": direction.dt_bias,
            "initial_state": None, "last_state": None, "reverse": direction.reverse,
        })  # fmt: skip
    kept = scan.launch_forward(scans, z, out, delta_softplus=True, scale=scale, save=save)
    return out, [low_SBLK, *kept] if save else []


def backward(
    dout: torch.Tensor, xz: torch.Tensor, directions: list, saved: list[torch.Tensor], *, scale: float
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor | None]]]:
    """Gradient of xz (B, L, 2E), and per direction those of its tensors by field name."""
    if xz.numel() == 0:
        empty = [
            {k: torch.zeros_like(v) for k, v in vars(direction).items() if isinstance(v, torch.Tensor)}
            for direction in directions
        ]
        return torch.zeros_like(xz), empty
    x, z = xz.chunk(2, dim=-1)
    dxz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    dx, dz = dxz.chunk(2, dim=-1)
    dout = scan.as_rows(dout, xz.dtype)
    ordered = _in_kernel_order(directions)
    rank, dstate = ordered[0].dt_proj_weight.shape[1], ordered[0].A.shape[1]
    low_SBLK, *kept = saved
    x_weights, dt_weights = _weights(ordered, xz.dtype)
    wide = dt_weights.shape[2]
    u_SBLE, low_SMK = _convolved(x, ordered), low_SBLK.flatten(1, 2)
    delta_SBLE = torch.bmm(low_SMK[..., :wide], dt_weights.mT).view(u_SBLE.shape)
    du_SBLE, ddelta_SBLE, dlow_SBLK = (torch.empty_like(t) for t in (u_SBLE, u_SBLE, low_SBLK))
    scans, grads = [], []
    for index, direction in enumerate(ordered):
        B, C = _states_in_out(low_SBLK[index], dstate)
        dB, dC = _states_in_out(dlow_SBLK[index], dstate)
        of_parameters = (direction.A, direction.D, direction.dt_bias)
        dA, dD, dbias = (torch.empty_like(t, dtype=torch.float32) for t in of_parameters)
        scans.append({
            "u": u_SBLE[index], "delta": delta_SBLE[index], "A": direction.A, "B": B, "C": C, "D": direction.D,
            "delta_bias": direction.dt_bias, "initial_state": None, "last_state": None, "reverse": direction.reverse,
        })  # fmt: skip
        grads.append(
            ScanGradients(u=du_SBLE[index], delta=ddelta_SBLE[index], A=dA, B=dB, C=dC, D=dD, delta_bias=dbias)
        )
    scan.launch_backward(scans, grads, z, dout, dz, kept, delta_softplus=True, scale=scale)
    grads = [{"dt_bias": found.delta_bias, "A": found.A, "D": found.D} for found in grads]
    du_SME, ddelta_SME, dlow_SMK, u_SME = (t.flatten(1, 2) for t in (du_SBLE, ddelta_SBLE, dlow_SBLK, u_SBLE))
    dlow_SMK[..., :wide] = torch.bmm(ddelta_SME, dt_weights)
    # One by one: a batched product does not split the long sum over tokens among the multiprocessors.
    ddt_weights = [ddelta.t() @ low[:, :wide] for ddelta, low in zip(ddelta_SME, low_SMK, strict=True)]
    dx_weights = [dlow.t() @ u for dlow, u in zip(dlow_SMK, u_SME, strict=True)]
    du_SME.baddbmm_(dlow_SMK, x_weights)
    convolution = _convolution_gradients(du_SBLE, x, ordered, dx)
    for named, more, ddt, dxw in zip(grads, convolution, ddt_weights, dx_weights, strict=True):
        named.update(more, dt_proj_weight=ddt[:, :rank], x_proj_weight=torch.cat([dxw[:rank], dxw[wide:]]))
    by_reverse = {direction.reverse: named for direction, named in zip(ordered, grads, strict=True)}
    return dxz, [by_reverse[direction.reverse] for direction in directions]
