"""Selective scan in Triton, on NVIDIA and AMD GPUs; on CPU tensors under TRITON_INTERPRET=1 if forced."""

import dataclasses
import math

import torch
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.tensors import cast_like, plain
from causal_conv1d_vim.runtime.triton import guard, tokens

from mamba_ssm_vim.ops.selective_scan.reference import ScanGradients

MAX_STATES = 64
BLOCK_E = 32  # channels of a program: one warp, a channel per lane
MIN_CHUNK = 128  # tokens: shorter chunks would spend more on their summaries than they gain


def why_not(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> str | None:
    """None if these kernels can serve u (B, L, E), A (E, N), B and C, else the reason."""
    if A.is_complex():
        return "A is complex"
    if A.shape[1] > MAX_STATES:
        return f"{A.shape[1]} states are more than {MAX_STATES}"
    if B.dim() != 4 or C.dim() != 4:
        return "B or C is constant over time"
    if B.shape[2] != C.shape[2]:
        return "B and C have different numbers of groups"
    return triton_runtime.why_not(u)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a scan is cut up. Depends on shapes and the device only, so results repeat bit for bit.

    Attributes:
        blocks: channel blocks of a group.
        tile, grad_tile: tokens of a tile (K of the kernels) forward, and in the gradient kernel.
        states: N rounded up to a power of two.
        chunks, chunk_len: pieces of the sequence that run side by side, and their tokens (a multiple of `tile`).
    """

    blocks: int
    tile: int
    grad_tile: int
    states: int
    chunks: int
    chunk_len: int


def plan(batch: int, seqlen: int, dim: int, dstate: int, groups: int, multiprocessors: int) -> Plan:
    """Cut a scan so that a tile's K·N values per channel fit a thread's registers and small batches fill the chip."""
    states = 1 << max(0, dstate - 1).bit_length()
    tile = max(1, min(16, 64 // states))
    grad_tile = max(1, min(16, 128 // states))
    blocks = math.ceil(dim // groups / BLOCK_E)
    programs = batch * groups * blocks
    # A chunked scan computes its exponentials twice, so it must at least double the number of busy warps to pay.
    # Four warps per multiprocessor keep its four schedulers busy, eight hide the latency of the loads.
    wanted = 1 if programs >= 4 * multiprocessors else 8 * multiprocessors // programs
    chunks = max(1, min(wanted, seqlen // MIN_CHUNK))
    if chunks < 3:
        chunks = 1
    chunk_len = math.ceil(math.ceil(seqlen / chunks) / grad_tile) * grad_tile
    return Plan(blocks, tile, grad_tile, states, math.ceil(seqlen / chunk_len), chunk_len)


def saved_shapes(x: torch.Tensor, batch: int, seqlen: int, dim: int, dstate: int, groups: int) -> list[tuple[int, ...]]:
    """Shapes of the float32 tensors that `forward` saves for a scan of these sizes on x's device."""
    if batch * seqlen * dim == 0:
        return []
    chunks = plan(batch, seqlen, dim, dstate, groups, triton_runtime.multiprocessors(x)).chunks
    return [(batch, chunks, dstate, dim), (batch, chunks, dim)] if chunks > 1 else []


def _plan(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> Plan:
    return plan(*u.shape, A.shape[1], B.shape[2], triton_runtime.multiprocessors(u))


def _state(t: torch.Tensor | None) -> torch.Tensor | None:
    """(B, E, N) → contiguous float32 (B, N, E), channels across lanes."""
    return None if t is None else t.float().transpose(1, 2).contiguous()


class _Launch:
    """The arguments that the kernels of one call share."""

    def __init__(self, u, delta, A, B, delta_bias, delta_softplus: bool, reverse: bool) -> None:
        from mamba_ssm_vim.ops.selective_scan import triton_kernels as kernels

        self.kernels = kernels
        self.plan = _plan(u, A, B)
        self.batch, self.seqlen, self.dim = u.shape
        self.dstate, self.groups = A.shape[1], B.shape[2]
        self.device = u.device
        self.u, self.delta, self.A, self.B, self.bias = tokens(u), tokens(delta), plain(A), tokens(B), delta_bias
        self.grid = (self.batch * self.groups * self.plan.blocks, self.plan.chunks)
        self.sizes = self.seqlen, self.dim, self.dstate, self.groups, self.plan.chunk_len, self.plan.chunks
        self.meta = {"N": self.plan.states, "BLOCK_E": BLOCK_E, "num_warps": 1, "num_stages": 1}
        self.flags = {"SOFTPLUS": delta_softplus, "REVERSE": reverse, "K": self.plan.tile, **self.meta}
        # The gradient kernel holds three times the values per step: its states are spread over four warps.
        self.grad_flags = {**self.flags, "K": self.plan.grad_tile, "num_warps": 4}

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def boundaries(self, enter: torch.Tensor | None) -> torch.Tensor:
        """The state on entering each tile of the gradient kernel (B, tiles, N, E)."""
        tile = self.plan.grad_tile
        boundaries = self.empty(self.batch, math.ceil(self.seqlen / tile), self.dstate, self.dim)
        self.kernels.scan_states[self.grid](
            *self.u, *self.delta, self.A, *self.B, self.bias, enter, boundaries, None, None, *self.sizes,
            SAVE_TILE=tile, **self.flags,
        )  # fmt: skip
        return boundaries

    def combine(self, start, state, dt, *, backward: bool) -> torch.Tensor:
        """Run `scan_combine`: the state on entering each chunk (B, chunks, N, E)."""
        enter, leave = torch.empty_like(state), self.empty(self.batch, self.dstate, self.dim)
        self.kernels.scan_combine[(self.batch * math.ceil(self.dim / BLOCK_E),)](
            self.A, start, state, dt, enter, leave, *self.sizes, BACKWARD=backward, **self.meta
        )
        return enter

    def chunk_starts(self, start: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The state on entering each chunk (None for zeros), and the chunks' summed steps if there are several."""
        chunks = self.plan.chunks
        if chunks == 1:
            return start, None
        state, dt = self.empty(self.batch, chunks, self.dstate, self.dim), self.empty(self.batch, chunks, self.dim)
        self.kernels.scan_states[self.grid](
            *self.u, *self.delta, self.A, *self.B, self.bias, None, None, state, dt, *self.sizes,
            SAVE_TILE=1, **self.flags,
        )  # fmt: skip
        return self.combine(start, state, dt, backward=False), dt


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse, out_scale=1.0,
    out=None, accumulate=False, save=False,
):  # fmt: skip
    """`selective_scan_ref` under the signature that backends share.

    Saved, and only when the sequence is cut in chunks: the state on entering each chunk and the chunk's summed step.
    States inside a chunk are recomputed by `backward`: keeping them would cost more memory than all activations.
    """
    if u.numel() == 0:
        last = u.new_zeros(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32)
        last = last if initial_state is None else initial_state.float().clone()
        return (u.new_empty(u.shape) if out is None else out), last, []
    run = _Launch(u, delta, A, B, delta_bias, delta_softplus, reverse)
    if out is None:
        out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last_state = run.empty(run.batch, run.dstate, run.dim)
    with guard(u):
        enter, dt = run.chunk_starts(_state(initial_state))
        run.kernels.scan_forward[run.grid](
            *run.u, *run.delta, run.A, *run.B, *tokens(C), _contiguous(D), *tokens(z), delta_bias, enter,
            *tokens(out if accumulate else None), *tokens(out), last_state, *run.sizes, float(out_scale), **run.flags,
        )  # fmt: skip
    saved = [enter, dt] if save and run.plan.chunks > 1 else []
    return out, last_state.transpose(1, 2).contiguous(), saved


def backward(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, saved, *, delta_softplus, reverse,
    out_scale=1.0, out=ScanGradients(), accumulate=False,
):  # fmt: skip
    """The gradients by name, each in its input's dtype.

    Args:
        out: only `z` may be given: (B, L, E), channel stride 1.
        accumulate: add to `out.z` instead of overwriting it.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0:
        grads = [None if t is None else torch.zeros_like(t) for t in inputs]
        if initial_state is not None and dlast_state is not None:
            grads[8] = dlast_state.to(initial_state.dtype)
        return ScanGradients(*grads)
    run = _Launch(u, delta, A, B, delta_bias, delta_softplus, reverse)
    p, (batch, seqlen, dim), (dstate, groups) = run.plan, u.shape, (run.dstate, run.groups)
    of_C, of_z, of_dout = tokens(C), tokens(z), tokens(dout)
    du, ddelta = (torch.empty(u.shape, dtype=t.dtype, device=u.device) for t in (u, delta))
    dz = torch.empty(u.shape, dtype=z.dtype, device=u.device) if z is not None and out.z is None else out.z
    dA, dstart = run.empty(batch * p.chunks, dstate, dim), run.empty(batch, dstate, dim)
    dD, dbias = run.empty(batch * p.chunks, dim), run.empty(batch * p.chunks, dim)
    dB, dC = (run.empty(p.blocks, batch, seqlen, groups, dstate) for _ in range(2))
    with guard(u):
        start, incoming = _state(initial_state), _state(dlast_state)
        enter, dt = saved if saved else run.chunk_starts(start)
        boundaries = run.boundaries(enter)
        if p.chunks > 1:
            local = run.empty(batch, p.chunks, dstate, dim)
            run.kernels.scan_grad_states[run.grid](
                *of_dout, *run.delta, run.A, *of_C, *of_z, delta_bias, local, *run.sizes, float(out_scale), **run.flags,
            )  # fmt: skip
            incoming = run.combine(incoming, local, dt, backward=True)
        run.kernels.scan_backward[run.grid](
            *of_dout, *run.u, *run.delta, run.A, *run.B, *of_C, _contiguous(D), *of_z, delta_bias, boundaries, incoming,
            du, ddelta, *tokens(dz), dA, dB, dC, dD, dbias, dstart, batch, *run.sizes, float(out_scale),
            ADD_DZ=accumulate, **run.grad_flags,
        )  # fmt: skip
    grads = (
        du, ddelta, dA.sum(0).t(), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0), dstart.transpose(1, 2),
    )  # fmt: skip
    return ScanGradients(*map(cast_like, grads, inputs))
