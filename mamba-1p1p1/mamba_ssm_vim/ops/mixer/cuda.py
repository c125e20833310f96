"""The mixer on NVIDIA GPUs: convolutions, projections, and one launch that scans both directions.

Forward: a convolution and two matrix products per direction, then one kernel in which the two directions meet
in the middle of the sequence, add up, are scaled and gated. Backward is left the low-rank projections and the states
on entering every 16 tokens; the convolved input and the step are made again.
"""

import torch
import torch.nn.functional as F
from causal_conv1d_vim.conv import cuda as conv

from mamba_ssm_vim.ops.selective_scan import cuda as scan


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
    return None


def _by_way(directions: list) -> list:
    """The directions in the order of the kernels for two: along the tokens, then against them."""
    return sorted(directions, key=lambda direction: direction.reverse)


def _convolved(x: torch.Tensor, directions: list) -> list[torch.Tensor]:
    """SiLU of each direction's convolution of x (B, L, E); two directions share a launch."""
    if len(directions) == 1:
        (one,) = directions
        return [conv.forward(x, one.conv_weight, one.conv_bias, None, silu=True, reverse=one.reverse)]
    ways = _by_way(directions)
    both = conv.forward_pair(x, [w.conv_weight for w in ways], [w.conv_bias for w in ways])
    return [both[int(direction.reverse)] for direction in directions]


def _convolution_gradients(dus: list[torch.Tensor], x: torch.Tensor, directions: list, dx: torch.Tensor) -> list[dict]:
    """Gradients of each direction's filter and bias; that of x goes to `dx`."""
    if len(directions) == 1:
        (one,) = directions
        _, dweight, dbias, _ = conv.backward(
            dus[0], x, one.conv_weight, one.conv_bias, None, silu=True, reverse=one.reverse, dx_into=dx
        )
        return [{"conv_weight": dweight, "conv_bias": dbias}]
    ways = _by_way(directions)
    by_way = [du for _, du in sorted(zip((d.reverse for d in directions), dus, strict=True), key=lambda pair: pair[0])]
    dweights, dbiases = conv.backward_pair(by_way, x, [w.conv_weight for w in ways], [w.conv_bias for w in ways], dx)
    return [{"conv_weight": dweights[int(d.reverse)], "conv_bias": dbiases[int(d.reverse)]} for d in directions]


def _step(low_rank: torch.Tensor, direction) -> torch.Tensor:
    """(B, L, R + 2N) → delta (B, L, E), before bias and softplus."""
    rank = direction.dt_proj_weight.shape[1]
    return F.linear(low_rank[..., :rank], direction.dt_proj_weight.to(low_rank.dtype))


def _states_in_out(low_rank: torch.Tensor, direction) -> tuple[torch.Tensor, torch.Tensor]:
    """B and C, (B, L, 1, N) column slices of the low-rank projection (B, L, R + 2N)."""
    dstate = direction.A.shape[1]
    B, C = low_rank[..., -2 * dstate :].unsqueeze(2).split(dstate, -1)
    return B, C


def forward(xz: torch.Tensor, directions: list, *, scale: float, save: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """xz (B, L, 2E) → out (B, L, E) = scale × Σ over directions of the gated scan; and what backward needs."""
    x, z = xz.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=xz.dtype, device=xz.device)
    if xz.numel() == 0:
        return out, []
    sides, kept = [], []
    for direction, u in zip(directions, _convolved(x, directions), strict=True):
        low_rank = F.linear(u, direction.x_proj_weight.to(xz.dtype))
        B, C = _states_in_out(low_rank, direction)
        sides.append({
            "u": u, "delta": _step(low_rank, direction), "A": direction.A, "B": B, "C": C, "D": direction.D,
            "delta_bias": direction.dt_bias, "initial_state": None, "last_state": None, "reverse": direction.reverse,
        })  # fmt: skip
        kept.append(low_rank)
    boundaries = scan.launch_forward(sides, z, out, delta_softplus=True, scale=scale, save=save)
    return out, [*kept, *boundaries] if save else []


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
    dout = dout.to(xz.dtype)
    grads, dus = [], []
    for index, (direction, u) in enumerate(zip(directions, _convolved(x, directions), strict=True)):
        low_rank, boundaries = saved[index], saved[len(directions) + index]
        rank = direction.dt_proj_weight.shape[1]
        delta = _step(low_rank, direction)
        B, C = _states_in_out(low_rank, direction)
        dlow_rank = torch.empty_like(low_rank)
        du, ddelta, dA, _, _, dD, _, dbias, _ = scan.backward(
            dout, None, u, delta, direction.A, B, C, direction.D, z, direction.dt_bias, None, [boundaries],
            delta_softplus=True, reverse=direction.reverse, out_scale=scale,
            dz_into=dz, accumulate_dz=index > 0, dbc_into=_states_in_out(dlow_rank, direction),
        )  # fmt: skip
        u2, ddelta2, low2, dlow2 = (t.flatten(0, 1) for t in (u, ddelta, low_rank, dlow_rank))
        dt_weight, x_weight = direction.dt_proj_weight.to(xz.dtype), direction.x_proj_weight.to(xz.dtype)
        dlow2[:, :rank] = ddelta2 @ dt_weight
        ddt_weight = ddelta2.t() @ low2[:, :rank]
        dx_weight = dlow2.t() @ u2
        du.flatten(0, 1).addmm_(dlow2, x_weight)
        dus.append(du)
        grads.append({
            "x_proj_weight": dx_weight, "dt_proj_weight": ddt_weight, "dt_bias": dbias, "A": dA, "D": dD,
        })  # fmt: skip
    for named, more in zip(grads, _convolution_gradients(dus, x, directions, dx), strict=True):
        named.update(more)
    return dxz, grads
