"""The mixer on the Triton kernels: the scan kernel adds and scales the directions, and little is kept for backward.

The forward pass keeps only the low-rank projections (R + 2N values per token and direction) and the states at the chunk
boundaries of a long sequence; the backward pass recomputes the convolved input and the step.
"""

import torch
import torch.nn.functional as F
from causal_conv1d_vim.conv import triton as conv
from causal_conv1d_vim.conv.reference import ConvGradients

from mamba_ssm_vim.ops.selective_scan import triton as scan
from mamba_ssm_vim.ops.selective_scan.reference import ScanGradients


def why_not(xz: torch.Tensor, directions: list) -> str | None:
    """None if these kernels can serve the mixer of xz (B, L, 2E) along `directions`, else the reason."""
    for direction in directions:
        if direction.A.shape[1] > scan.MAX_STATES:
            return f"{direction.A.shape[1]} states are more than {scan.MAX_STATES}"
        if direction.conv_weight.shape[1] > conv.MAX_WIDTH:
            return f"the convolution's width is {direction.conv_weight.shape[1]}, more than {conv.MAX_WIDTH}"
    return conv.why_not(xz)


def _convolved(x: torch.Tensor, direction) -> torch.Tensor:
    return conv.forward(x, direction.conv_weight, direction.conv_bias, None, silu=True, reverse=direction.reverse)


def _split(low_rank: torch.Tensor, direction) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, L, R + 2N) → delta (B, L, E) before bias and softplus, B and C (B, L, 1, N)."""
    rank, dstate = direction.dt_proj_weight.shape[1], direction.A.shape[1]
    dt, B, C = low_rank.split([rank, dstate, dstate], -1)
    return F.linear(dt, direction.dt_proj_weight.to(dt.dtype)), B.unsqueeze(2), C.unsqueeze(2)


def saved_shapes(xz: torch.Tensor, directions: list) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `forward` saves."""
    (batch, seqlen, width), shapes = xz.shape, []
    for direction in directions:
        rank, dstate = direction.dt_proj_weight.shape[1], direction.A.shape[1]
        shapes.append(((batch, seqlen, rank + 2 * dstate), xz.dtype))
        for _ in direction.scans():
            shapes += [(s, torch.float32) for s in scan.saved_shapes(xz, batch, seqlen, width // 2, dstate, 1)]
    return shapes


def forward(xz: torch.Tensor, directions: list, *, scale: float, save: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """xz (B, L, 2E) → out (B, L, E) = scale × Σ over directions of the gated scan; and what backward needs."""
    x, z = xz.chunk(2, dim=-1)
    out, kept = None, []
    for direction in directions:
        u = _convolved(x, direction)
        low_rank = F.linear(u, direction.x_proj_weight.to(xz.dtype))
        kept.append(low_rank)
        delta, B, C = _split(low_rank, direction)
        for _, A, reverse in direction.scans():
            out, _, states = scan.forward(
                u, delta, A, B, C, direction.D, z, direction.dt_bias, None,
                delta_softplus=True, reverse=reverse, out_scale=scale, out=out, accumulate=out is not None, save=save,
            )  # fmt: skip
            kept += states
    return out, kept if save else []


def backward(
    dout: torch.Tensor, xz: torch.Tensor, directions: list, saved: list[torch.Tensor], *, scale: float
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor | None]]]:
    """Gradient of xz (B, L, 2E), and per direction those of its tensors by field name."""
    x, z = xz.chunk(2, dim=-1)
    dxz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    dx, dz = dxz.chunk(2, dim=-1)
    dout = dout.to(xz.dtype)
    saved = list(saved)
    count = sum(len(direction.scans()) for direction in directions)
    with_states = (len(saved) - len(directions)) // count  # tensors per scan: 0, or 2 if it was cut in chunks
    grads, touched = [], False
    for index, direction in enumerate(directions):
        low_rank = saved.pop(0)
        u = _convolved(x, direction)
        delta, B, C = _split(low_rank, direction)
        total = None
        named: dict[str, torch.Tensor | None] = {}
        for name, A, reverse in direction.scans():
            states, saved = saved[:with_states], saved[with_states:]
            found = scan.backward(
                dout, None, u, delta, A, B, C, direction.D, z, direction.dt_bias, None, states,
                delta_softplus=True, reverse=reverse, out_scale=scale, out=ScanGradients(z=dz), accumulate=touched,
            )  # fmt: skip
            touched = True
            named[name] = found.A
            parts = (found.u, found.delta, found.B, found.C, found.D, found.delta_bias)
            total = parts if total is None else tuple(a + b for a, b in zip(total, parts, strict=True))
        du, ddelta, dB, dC, named["D"], named["dt_bias"] = total
        dt_weight, x_weight = direction.dt_proj_weight.to(xz.dtype), direction.x_proj_weight.to(xz.dtype)
        rank = dt_weight.shape[1]
        dlow = torch.cat([ddelta @ dt_weight, dB.squeeze(2), dC.squeeze(2)], -1)
        ddelta2, low2, dlow2, u2 = (t.flatten(0, 1) for t in (ddelta, low_rank, dlow, u))
        named["dt_proj_weight"] = ddelta2.t() @ low2[:, :rank]
        named["x_proj_weight"] = dlow2.t() @ u2
        du = torch.addmm(du.flatten(0, 1), dlow2, x_weight).view(u.shape)
        convolved = conv.backward(
            du, x, direction.conv_weight, direction.conv_bias, None,
            silu=True, reverse=direction.reverse, out=ConvGradients(x=dx), accumulate=index > 0,
        )  # fmt: skip
        named["conv_weight"], named["conv_bias"] = convolved.weight, convolved.bias
        grads.append(named)
    return dxz, grads
