"""One step of the selective scan in Triton, in place."""

import torch
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.tensors import unsupported_dtype


def why_not(state, x, dt, A, B, C, D, z, dt_bias) -> str | None:
    """None if the kernel can do the step in place, else the reason."""
    if x.numel() == 0:
        return "there is nothing to do"
    if not state.is_contiguous():
        return "the state is not contiguous"
    for t in (state, x, dt, A, B, C, D, z, dt_bias):
        if t is not None and (reason := unsupported_dtype(t)) is not None:
            return reason
        if t is not None and t.device != x.device:
            return "the tensors are on several devices"
    return triton_runtime.why_not(x)


def forward(state, x, dt, A, B, C, D, z, dt_bias, *, dt_softplus) -> torch.Tensor:
    """out like x, after updating `state`, which must be contiguous, in place."""
    from mamba_ssm_vim.ops.state_update.triton_kernels import state_update

    batch, channels, dstate = x.shape[0], x[0].numel(), state.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dt, A, B, C, D, z, dt_bias = (None if t is None else t.contiguous() for t in (x, dt, A, B, C, D, z, dt_bias))
    states = 1 << max(0, dstate - 1).bit_length()
    block = max(1, min(64, 4096 // states))
    with triton_runtime.guard(x):
        state_update[(batch, -(-channels // block))](
            state, x, dt, A, B, C, D, z, dt_bias, out, channels, dstate, B.shape[1] if B.dim() == 3 else 1,
            SOFTPLUS=dt_softplus, N=states, BLOCK_E=block, num_warps=4,
        )  # fmt: skip
    return out
