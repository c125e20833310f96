"""CPU backend of the mixer: per direction one kernel for convolution and x_proj, and one for the scan.

The step's projection happens inside the scan, the second direction adds onto the first one's output, and nothing is
flipped or copied. Backward keeps xz, x_proj's small output (B, L, R + 2N) and the chunk states, and recomputes u.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from causal_conv1d_vim.conv import cpu as conv
from causal_conv1d_vim.conv.reference import ConvGradients
from causal_conv1d_vim.runtime import cpu_library

from mamba_ssm_vim.ops.selective_scan import cpu as scan
from mamba_ssm_vim.ops.selective_scan.reference import ScanGradients

if TYPE_CHECKING:
    from mamba_ssm_vim.ops.mixer.reference import Direction


def why_not(xz: torch.Tensor, directions: "list[Direction]") -> str | None:
    """None if this mixer can be served here, else the reason."""
    if conv.library.reason is not None:
        return conv.library.reason
    if (reason := cpu_library.why_not(scan.library, xz)) is not None:
        return reason
    for p in directions:
        for name, A, _ in p.scans():
            if A.dtype is not torch.float32:
                return f"{name} is {A.dtype}, not float32"
        if p.conv_weight.shape[1] > conv.MAX_WIDTH:
            return f"the convolution is wider than {conv.MAX_WIDTH}"
    return None


def _split(x_dbl: torch.Tensor, rank: int, states: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_proj's output (B, L, R + 2N) as views: the low-rank step, B and C with one group."""
    B = x_dbl[..., rank : rank + states].unsqueeze(2)
    return x_dbl[..., :rank], B, x_dbl[..., rank + states :].unsqueeze(2)


def saved_shapes(xz: torch.Tensor, directions: "list[Direction]") -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `forward` saves."""
    (batch, seqlen, width), shapes = xz.shape, []
    for p in directions:
        rank, states = p.dt_proj_weight.shape[1], p.A.shape[1]
        shapes.append(((batch, seqlen, rank + 2 * states), xz.dtype))
        shapes += [(scan.saved_shape(batch, seqlen, width // 2, states, 1), torch.float32) for _ in p.scans()]
    return shapes


def forward(
    xz: torch.Tensor, directions: "list[Direction]", *, scale: float, save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """out (B, L, E) in xz's dtype, and per direction x_proj's output and each scan's chunk states if `save`."""
    x, z = xz.chunk(2, dim=-1)
    out, saved, u = None, [], None
    for p in directions:
        settings = {"silu": True, "reverse": p.reverse, "out": u}
        if x.dtype is torch.float32:
            u, x_dbl = conv.forward_projected(x, p.conv_weight, p.conv_bias, p.x_proj_weight, **settings)
        else:  # 16-bit products have matrix units, which torch's GEMM uses
            u = conv.forward(x, p.conv_weight, p.conv_bias, None, **settings)
            x_dbl = F.linear(u, p.x_proj_weight.to(u.dtype))
        low_rank, B, C = _split(x_dbl, p.dt_proj_weight.shape[1], p.A.shape[1])
        if save:
            saved.append(x_dbl)
        for _, A, reverse in p.scans():
            out, _, states = scan.forward(
                u, low_rank, A, B, C, p.D, z, p.dt_bias, None, delta_softplus=True, reverse=reverse,
                out_scale=scale, out=out, accumulate=out is not None, save=save, dt_weight=p.dt_proj_weight,
            )  # fmt: skip
            saved += states
    return out, saved


def backward(
    dout: torch.Tensor, xz: torch.Tensor, directions: "list[Direction]", saved: list[torch.Tensor], *, scale: float
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor | None]]]:
    """dxz (B, L, 2E) in xz's dtype, and per direction the gradients of its tensors by field name."""
    x, z = xz.chunk(2, dim=-1)
    dxz = xz.new_empty(xz.shape)
    dx, dz = dxz.chunk(2, dim=-1)
    rest, all_grads = iter(saved), []
    u, du = (x.new_empty(x.shape, dtype=torch.float32) for _ in range(2))
    for index, p in enumerate(directions):
        rank, states = p.dt_proj_weight.shape[1], p.A.shape[1]
        conv.forward(x, p.conv_weight, p.conv_bias, None, silu=True, reverse=p.reverse, out=u)
        x_dbl = next(rest)
        low_rank, B, C = _split(x_dbl, rank, states)
        grads: dict[str, torch.Tensor | None] = {}
        dx_dbl = torch.empty(x_dbl.shape, dtype=torch.float32)
        for number, (name, A, reverse) in enumerate(p.scans()):
            first = number == 0
            part = dx_dbl if first else torch.empty_like(dx_dbl)
            dlow_rank, dB, dC = _split(part, rank, states)
            out = ScanGradients(u=du if first else torch.empty_like(du), delta=dlow_rank, B=dB, C=dC, z=dz)
            scanned, ddt_weight = scan.backward_projected(
                dout, u, low_rank, A, B, C, p.D, z, p.dt_bias, p.dt_proj_weight, [next(rest)], delta_softplus=True,
                reverse=reverse, out_scale=scale, out=out, accumulate=index + number > 0,
            )  # fmt: skip
            found = {"dt_proj_weight": ddt_weight, "dt_bias": scanned.delta_bias, "D": scanned.D}
            if not first:  # shared parameters: the two scans' gradients add up
                du.add_(out.u)
                dx_dbl.add_(part)
                found = {k: None if v is None else grads[k].add_(v) for k, v in found.items()}
            grads |= {**found, name: scanned.A}
        dx_rows, du_rows = dx_dbl.view(-1, rank + 2 * states), du.view(-1, du.shape[-1])
        grads["x_proj_weight"] = dx_rows.t() @ u.view(-1, u.shape[-1])
        du_rows.addmm_(dx_rows, p.x_proj_weight.to(torch.float32))
        convolved = conv.backward(
            du, x, p.conv_weight, p.conv_bias, None, silu=True, reverse=p.reverse, out=ConvGradients(x=dx),
            accumulate=index > 0,
        )  # fmt: skip
        all_grads.append({**grads, "conv_weight": convolved.weight, "conv_bias": convolved.bias})
    return dxz, all_grads
