"""One step of the selective scan in plain PyTorch, and the shapes that it takes."""

import torch
import torch.nn.functional as F
from causal_conv1d_vim.runtime.operators import check as check_tensors

_Optional = torch.Tensor | None


def selective_state_update_ref(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: _Optional = None,
    z: _Optional = None,
    dt_bias: _Optional = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """`selective_state_update` without `state_batch_indices`, in plain PyTorch."""
    check(state, x, dt, A, B, C, D, z, dt_bias)
    compute = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(compute) if dt_bias is None else dt.to(compute) + dt_bias.to(compute)
    step = (F.softplus(step) if dt_softplus else step).unsqueeze(-1)

    def per_channel(t):
        if t.dim() == 3:
            t = t.repeat_interleave(x.shape[1] // t.shape[1], dim=1)
        return t.to(compute).unsqueeze(-2)

    before = state.detach().to(compute, copy=True)
    after = torch.exp(step * A.to(compute)) * before + step * per_channel(B) * x.to(compute).unsqueeze(-1)
    out = (after * per_channel(C)).sum(-1)
    if D is not None:
        out = out + x.to(compute) * D.to(compute)
    if z is not None:
        out = out * F.silu(z.to(compute))
    with torch.no_grad():
        state.copy_(after)
    return out.to(x.dtype)


def check(state, x, dt, A, B, C, D, z, dt_bias) -> None:
    """Raise ValueError for shapes or types that do not fit, or tensors on different devices."""
    if state.dim() not in (3, 4):
        raise ValueError(f"state must be (batch, dim, dstate) or (batch, heads, dim, dstate), got {tuple(state.shape)}")
    batch, *channels, dstate = state.shape
    if 0 in (*channels, dstate):
        raise ValueError(f"state must have at least one channel and one state, got {tuple(state.shape)}")
    rows, per_channel = (batch, *channels), tuple(channels)
    check_tensors(
        (("x", x, rows), ("state", state, None), ("dt", dt, rows), ("A", A, (*channels, dstate)), ("B", B, None),
         ("C", C, None), ("D", D, per_channel), ("z", z, rows), ("dt_bias", dt_bias, per_channel)),
        activations=("dt", "z"),
    )  # fmt: skip
    for name, t in (("B", B), ("C", C)):
        fits = t.dim() == state.dim() - 1 and t.shape[0] == batch and t.shape[-1] == dstate
        if not fits or (t.dim() == 3 and (t.shape[1] == 0 or channels[0] % t.shape[1])):
            expected = "(batch, dstate)" if state.dim() == 3 else "(batch, groups, dstate), with groups dividing heads"
            raise ValueError(f"{name} must be {expected} for a state {tuple(state.shape)}, got {tuple(t.shape)}")
