"""CPU backend of the selective scan: packs the arguments of mamba-1p1p1/csrc/cpu/scan.h.

Besides the common signature, `forward` takes `dt_weight`: `delta` is then the low-rank step (B, L, R), and the scan
projects it to E channels itself, so that (B, L, E) steps are never written to memory. `backward_projected` is its
backward.
"""

import functools

import torch
from causal_conv1d_vim.runtime import cpu_library
from causal_conv1d_vim.runtime.tensors import DTYPES, address, cast_like, plain, rows

from mamba_ssm_vim.cpu_library import library
from mamba_ssm_vim.ops.selective_scan.reference import ScanGradients

CHUNK = 32  # tokens between kept states, SCAN_CHUNK in scan.h
BLOCK = 16  # channels per block, BLOCK in simd.h

ARGUMENTS = cpu_library.Arguments(
    "batch len dim states groups rank softplus reverse accumulate threads b_constant c_constant b_group_stride "
    "c_group_stride scale:double u:tokens delta:tokens z:tokens B:tokens C:tokens out:tokens A D bias dt_weight "
    "initial_state last_state saved"
)
GRAD_ARGUMENTS = cpu_library.Arguments(
    "dout:tokens du:tokens ddelta:tokens dz:tokens accumulate_dz dlast_state dinitial_state dA dD dbias dB_constant "
    "dC_constant dx ddt_weight",
    base=ARGUMENTS,
)

_forward = library.function("vim_scan_forward", ARGUMENTS)
_backward = library.function("vim_scan_backward", GRAD_ARGUMENTS)

_PARALLEL_FROM = 1 << 15  # state updates; fewer are done before a second thread has woken up
_NONE = (None, (0, 0, 0, 0))
_TYPES = frozenset(DTYPES)


def why_not(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> str | None:
    """None if these inputs of a scan can be served here, else the reason."""
    types = A.dtype, B.dtype, C.dtype
    if not _TYPES.issuperset(types):
        if any(dtype.is_complex for dtype in types):
            return "complex A, B or C"
        if torch.float64 in types:
            return "A, B or C is float64"
    if B.dim() == C.dim() == 4 and B.shape[2] != C.shape[2]:
        return "B and C have different numbers of groups"
    return cpu_library.why_not(library, u, A, B, C)


def _tokens(t: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, int, int, int]]:
    """A (B, L, ...) tensor with adjacent channels, copied only if need be: pointer, dtype, batch and token stride."""
    if t is None:
        return _NONE
    strides = t.stride()
    if strides[-1] != 1:
        t = rows(t)
        strides = t.stride()
    return t, (t.data_ptr(), DTYPES[t.dtype], strides[0], strides[1])


def _projection(t: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int], bool, int]:
    """B or C as the kernel reads it: like `_tokens`, then whether it is constant, and its group stride."""
    strides = t.stride()
    if len(strides) == 2:
        t = plain(t)
        return t, (t.data_ptr(), 0, 0, 0), True, 0
    if strides[3] != 1:
        t = rows(t)
        strides = t.stride()
    return t, (t.data_ptr(), DTYPES[t.dtype], strides[0], strides[1]), False, strides[2]


def _groups(B: torch.Tensor, C: torch.Tensor) -> int:
    return B.shape[2] if B.dim() == 4 else C.shape[2] if C.dim() == 4 else 1


def saved_shape(batch: int, seqlen: int, dim: int, states: int, groups: int) -> tuple[int, ...]:
    """Shape of the float32 states that `forward` saves, those before every chunk."""
    return batch, -(-seqlen // CHUNK), groups * -(-dim // groups // BLOCK), states, BLOCK


def _scan_args(
    u, delta, A, B, C, D, z, delta_bias, initial_state, dt_weight, out, last_state, saved,
    *, delta_softplus, reverse, out_scale, accumulate,
):  # fmt: skip
    """Bytes of a ScanArgs, and whatever must stay alive while the kernel runs."""
    batch, seqlen, dim = u.shape
    states = A.shape[1]
    B, of_b, b_constant, b_group = _projection(B)
    C, of_c, c_constant, c_group = _projection(C)
    groups = _groups(B, C)
    (u, of_u), (delta, of_delta), (z, of_z) = _tokens(u), _tokens(delta), _tokens(z)
    A, D, delta_bias, initial_state, dt_weight = map(plain, (A, D, delta_bias, initial_state, dt_weight))
    threads = torch.get_num_threads() if batch * seqlen * dim * states >= _PARALLEL_FROM else 1
    packed = ARGUMENTS.pack(
        batch, seqlen, dim, states, groups, 0 if dt_weight is None else dt_weight.shape[1],
        delta_softplus, reverse, accumulate, threads, b_constant, c_constant, b_group, c_group, out_scale,
        *of_u, *of_delta, *of_z, *of_b, *of_c, *_tokens(out)[1],
        A.data_ptr(), address(D), address(delta_bias), address(dt_weight), address(initial_state),
        address(last_state), address(saved),
    )  # fmt: skip
    return packed, (u, delta, A, B, C, D, z, delta_bias, initial_state, dt_weight)


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    save: bool = False,
    dt_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out (B, L, E), last_state (B, E, N) float32, and the states kept for `backward`; see `selective_scan_ref`.

    Args:
        out_scale: factor of the gated output.
        out: where to write, (B, L, E), channel stride 1, any supported dtype; allocated in u's dtype if None.
        accumulate: add to `out` instead of overwriting it.
        save: keep the state before every chunk of 32 tokens.
        dt_weight: (E, R), see the module's docstring.
    """
    batch, seqlen, dim = u.shape
    states = A.shape[1]
    if out is None:
        out = u.new_empty((batch, seqlen, dim))
    last_state = u.new_empty((batch, dim, states), dtype=torch.float32)
    saved = None
    if save:
        saved = u.new_empty(saved_shape(batch, seqlen, dim, states, _groups(B, C)), dtype=torch.float32)
    if last_state.numel():
        packed, _alive = _scan_args(
            u, delta, A, B, C, D, z, delta_bias, initial_state, dt_weight, out, last_state, saved,
            delta_softplus=delta_softplus, reverse=reverse, out_scale=out_scale, accumulate=accumulate,
        )  # fmt: skip
        _forward(packed)
    return out, last_state, [] if saved is None else [saved]


def backward(
    dout: torch.Tensor,
    dlast_state: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    saved: list[torch.Tensor],
    *,
    delta_softplus: bool,
    reverse: bool,
    out_scale: float = 1.0,
) -> ScanGradients:
    """The gradients by name, contiguous and in their inputs' dtypes."""
    batch, seqlen, _ = u.shape
    n, groups = A.shape[1], _groups(B, C)
    # Shapes, not empty_like: results are contiguous whatever the strides of the inputs.
    dBC = u.new_empty((batch, seqlen, groups, 2 * n), dtype=torch.float32)
    dB, dC = dBC.split(n, -1)
    out = ScanGradients(
        u=u.new_empty(u.shape), delta=delta.new_empty(delta.shape), B=None if B.dim() == 2 else dB,
        C=None if C.dim() == 2 else dC, z=None if z is None else z.new_empty(z.shape),
    )  # fmt: skip
    found, _ = _backward_into(
        dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, saved[0], dBC, out,
        delta_softplus=delta_softplus, reverse=reverse, out_scale=out_scale,
    )  # fmt: skip
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = map(cast_like, found, inputs)
    return ScanGradients(du, ddelta, dA, dB.contiguous(), dC.contiguous(), dD, dz, dbias, dinitial)


def backward_projected(
    dout: torch.Tensor,
    u: torch.Tensor,
    low_rank: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    dt_weight: torch.Tensor,
    saved: list[torch.Tensor],
    *,
    delta_softplus: bool,
    reverse: bool,
    out_scale: float,
    out: ScanGradients,
    accumulate: bool,
) -> tuple[ScanGradients, torch.Tensor]:
    """Backward of a `forward` with `dt_weight`: the gradients by name, in float32, and that of `dt_weight` (E, R).

    Args:
        low_rank: (B, L, R), the step before its projection.
        B, C: (B, L, 1, N).
        out: `u` and `z` (B, L, E), channel stride 1, any supported dtype; `delta` (that is, `low_rank`'s), `B` and `C`:
            column slices, in this order, of one contiguous float32 tensor (B, L, R + 2N).
        accumulate: add to `out.z` instead of overwriting it.
    """
    return _backward_into(
        dout, None, u, low_rank, A, B, C, D, z, delta_bias, None, saved[0], out.delta, out,
        delta_softplus=delta_softplus, reverse=reverse, out_scale=out_scale, dt_weight=dt_weight, accumulate=accumulate,
    )  # fmt: skip


def _backward_into(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, saved, dx, out,
    *, delta_softplus, reverse, out_scale, dt_weight=None, accumulate=False,
) -> tuple[ScanGradients, torch.Tensor | None]:  # fmt: skip
    """Run the kernel: `out` holds the token-sized gradients, `dx` is where those of the projections start."""
    batch, _, dim = u.shape
    n = A.shape[1]
    dout, dlast_state = rows(dout), plain(dlast_state)
    new = functools.partial(torch.empty if batch else torch.zeros, dtype=torch.float32, device=u.device)
    b_constant, c_constant = B.dim() == 2, C.dim() == 2
    dA, dB, dC = new((dim, n)), new((dim, n)) if b_constant else out.B, new((dim, n)) if c_constant else out.C
    dD, dbias = None if D is None else new(dim), None if delta_bias is None else new(dim)
    dinitial = None if initial_state is None else new((batch, dim, n))
    ddt_weight = None if dt_weight is None else new(dt_weight.shape)
    if batch:
        packed, _alive = _scan_args(
            u, delta, A, B, C, D, z, delta_bias, initial_state, dt_weight, None, None, saved,
            delta_softplus=delta_softplus, reverse=reverse, out_scale=out_scale, accumulate=False,
        )  # fmt: skip
        _backward(
            packed
            + GRAD_ARGUMENTS.pack(
                *_tokens(dout)[1], *_tokens(out.u)[1], *_tokens(out.delta if dt_weight is None else None)[1],
                *_tokens(out.z)[1], accumulate,
                address(dlast_state), address(dinitial), address(dA), address(dD), address(dbias),
                address(dB) if b_constant else 0, address(dC) if c_constant else 0, address(dx), address(ddt_weight),
            )
        )  # fmt: skip
    return ScanGradients(out.u, out.delta, dA, dB, dC, dD, out.z, dbias, dinitial), ddt_weight
