"""Selective scan in plain PyTorch: the specification that every backend is tested against.

Shapes: B batch, L tokens, E channels, N states, G groups (E is a multiple of G).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from causal_conv1d_vim.runtime.autodiff import gradients


class ScanGradients(NamedTuple):
    """The gradient of each input by its name, None where the input is None.

    As the argument `out` of a backend's `backward` it says where to write: None stands for a new tensor.
    """

    u: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    C: torch.Tensor | None = None
    D: torch.Tensor | None = None
    z: torch.Tensor | None = None
    delta_bias: torch.Tensor | None = None
    initial_state: torch.Tensor | None = None


def why_not(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> str | None:
    """The reference serves every device, dtype and shape."""
    return None


def _per_channel(x_BLGN: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, L, G, N) → (B, L, E, N): channel e uses group e // (E / G)."""
    return x_BLGN.repeat_interleave(dim // x_BLGN.shape[2], dim=2)


def selective_scan_ref(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 2a-2b of arXiv 2312.00752 with the zero-order hold of A and the Euler step of B.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,   y_t = C_t h_t + D u_t,   out_t = y_t SiLU(z_t)

    Args:
        u: (B, L, E).
        delta: (B, L, E); dt = softplus(delta + delta_bias) or delta + delta_bias.
        A: (E, N), real or complex.
        B: (B, L, G, N) or constant (E, N); complex if A is.
        C: like B. For complex A the output is 2 Re(C h).
        D: (E,) or None.
        z: (B, L, E) or None, the gate.
        delta_bias: (E,) or None.
        initial_state: (B, E, N) or None.
        delta_softplus: apply softplus to the step.
        reverse: run from the last token to the first.

    Returns:
        out (B, L, E) in u's dtype; last_state (B, E, N), float32 (float64 for float64 inputs, or complex).
    """
    batch, seqlen, dim = u.shape
    compute = torch.promote_types(u.dtype, torch.float32)
    state_dtype = torch.promote_types(A.dtype, compute)
    dt = delta.to(compute)
    if delta_bias is not None:
        dt = dt + delta_bias.to(compute)
    if delta_softplus:
        dt = F.softplus(dt)
    x = u.to(compute)
    A = A.to(state_dtype)
    B, C = B.to(state_dtype), C.to(state_dtype)
    B_t = B[None, None].expand(batch, seqlen, dim, -1) if B.dim() == 2 else _per_channel(B, dim)
    C_t = C[None, None].expand(batch, seqlen, dim, -1) if C.dim() == 2 else _per_channel(C, dim)

    if initial_state is None:
        state = torch.zeros(batch, dim, A.shape[1], dtype=state_dtype, device=u.device)
    else:
        state = initial_state.to(state_dtype)
    # Unbinding, rather than indexing, keeps the gradient's work proportional to L.
    tokens = list(zip(dt.unbind(1), (dt * x).unbind(1), B_t.unbind(1), C_t.unbind(1), strict=True))
    steps = []
    for dt_t, dtx_t, b_t, c_t in reversed(tokens) if reverse else tokens:
        state = torch.exp(dt_t[..., None] * A) * state + dtx_t[..., None] * b_t
        y_t = (state * c_t).sum(-1)
        steps.append(2 * y_t.real if y_t.is_complex() else y_t)
    if seqlen:
        y = torch.stack(steps[::-1] if reverse else steps, dim=1)
    else:  # results of their own, not the inputs themselves
        y, state = x.clone(), state.clone()
    if D is not None:
        y = y + x * D.to(compute)
    if z is not None:
        y = y * F.silu(z.to(compute))
    return y.to(u.dtype), state


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse, out_scale=1.0,
    out=None, accumulate=False, save=False,
):  # fmt: skip
    """`selective_scan_ref` under the signature that backends share; nothing is saved, backward recomputes."""
    result, last_state = selective_scan_ref(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus=delta_softplus, reverse=reverse
    )
    if out_scale != 1.0:
        result = result * out_scale
    if out is not None:
        result = out.add_(result) if accumulate else out.copy_(result)
    return result, last_state, []


def backward(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, saved, *, delta_softplus, reverse,
    out_scale=1.0,
):  # fmt: skip
    """The gradients by differentiating the reference."""
    found = gradients(
        lambda *tensors: selective_scan_ref(*tensors, delta_softplus=delta_softplus, reverse=reverse),
        (u, delta, A, B, C, D, z, delta_bias, initial_state),
        (dout if out_scale == 1.0 else dout * out_scale, dlast_state),
    )
    return ScanGradients(*found)
