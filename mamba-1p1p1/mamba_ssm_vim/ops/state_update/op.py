"""One step of the selective scan for token-by-token inference: the published function."""

import torch
from causal_conv1d_vim.runtime.autodiff import dispatched
from causal_conv1d_vim.runtime.operators import check_integers
from causal_conv1d_vim.runtime.registry import OpBackends

from mamba_ssm_vim.ops.selective_scan import selective_scan
from mamba_ssm_vim.ops.state_update.reference import check

backends = OpBackends("selective_state_update", "mamba_ssm_vim.ops.state_update")

_Optional = torch.Tensor | None


def selective_state_update(
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
    state_batch_indices: _Optional = None,
) -> torch.Tensor:
    """h = exp(dt A) h + dt B x, in place in `state`; y = (C h + D x) SiLU(z): a scan over a single token.

    Every shape may carry a dimension of heads before `dim` (Mamba-2); B and C then have one of groups, which divide the
    heads. Gradients reach the other tensors, not the state.

    Args:
        state: (batch, [heads,] dim, dstate), or (rows, ...) with `state_batch_indices`; any floating dtype.
        x: (batch, [heads,] dim).
        dt: like x; with `dt_softplus` the step is softplus(dt + dt_bias).
        A: ([heads,] dim, dstate).
        B, C: (batch, [groups,] dstate).
        D: ([heads,] dim) or None.
        z: like x, or None.
        dt_bias: ([heads,] dim) or None.
        dt_softplus: see `dt`.
        state_batch_indices: (batch,) integers or None: the row of `state` of each batch entry; for a negative one the
            output is zero and no row is touched.

    Returns:
        Like x, in its dtype; the arithmetic is float32.

    Raises:
        ValueError: shapes or types that do not fit, or tensors on different devices.
    """
    if state_batch_indices is not None:
        return _update_rows(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    check(state, x, dt, A, B, C, D, z, dt_bias)
    inputs = (state, x, dt, A, B, C, D, z, dt_bias)
    if not torch.is_grad_enabled() and not dispatched([t for t in inputs if t is not None]):
        backend = backends.fused(*inputs)
        if backend is not None:
            return backend.forward(*inputs, dt_softplus=dt_softplus)
    channels = x[0].numel() if x.shape[0] else x.shape[1:].numel()

    def token(t):
        return None if t is None else t.reshape(t.shape[0], 1, channels)

    def per_channel(t):
        return None if t is None else t.reshape(channels)

    def projection(t):
        return t.unsqueeze(1) if t.dim() == 3 else t[:, None, None]

    before = state.reshape(-1, channels, state.shape[-1])
    if torch.is_grad_enabled():
        before = before.detach().clone()  # backward needs what the update overwrites
    out, after = selective_scan(
        token(x), token(dt), A.reshape(channels, -1), projection(B), projection(C), per_channel(D), token(z),
        per_channel(dt_bias), delta_softplus=dt_softplus, initial_state=before, return_last_state=True,
    )  # fmt: skip
    with torch.no_grad():
        state.copy_(after.view(state.shape))
    return out.view(x.shape)


def _update_rows(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, indices) -> torch.Tensor:
    check_integers("state_batch_indices", indices, x.shape[:1])
    # The rows as they will be, before any of them is picked.
    check(state.new_empty(1).expand(*x.shape[:1], *state.shape[1:]), x, dt, A, B, C, D, z, dt_bias)
    live = indices >= 0
    rows = indices[live].long()
    states = state[rows]
    out = selective_state_update(
        states, x[live], dt[live], A, B[live], C[live], D, None if z is None else z[live], dt_bias, dt_softplus
    )
    with torch.no_grad():
        state[rows] = states
    return out.new_zeros(x.shape).index_put((live,), out)
