"""CPU backend of the selective scan: packs the arguments of mamba-1p1p1/csrc/cpu/scan.h.

Besides the common signature, `forward` and `backward` take `dt_weight`: `delta` is then the low-rank step (B, L, R) and
the projection to E channels happens inside the scan, so that (B, L, E) steps are never written to memory.
"""

import functools
import struct

import torch
from causal_conv1d_vim.runtime import cpu_library
from causal_conv1d_vim.runtime.cpu_library import DTYPES, plain, pointer, rows

from mamba_ssm_vim.cpu_library import library

CHUNK = 32  # tokens between kept states, SCAN_CHUNK in scan.h
BLOCK = 16  # channels per block, BLOCK in simd.h

_forward = library.function("vim_scan_forward")
_backward = library.function("vim_scan_backward")
_pack = struct.Struct("=14qd31q").pack
_pack_grad = struct.Struct("=26q").pack

_PARALLEL_FROM = 1 << 15  # state updates; fewer are done before a second thread has woken up
_NONE = (None, (0, 0, 0, 0))


def why_not(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> str | None:
    """None if these inputs of a scan can be served here, else the reason."""
    if A.dtype.is_complex or B.dtype.is_complex or C.dtype.is_complex:
        return "complex A, B or C"
    if torch.float64 in (A.dtype, B.dtype, C.dtype):
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
    if t.dim() == 2:
        t = plain(t)
        return t, (t.data_ptr(), 0, 0, 0), True, 0
    t, fields = _tokens(t)
    return t, fields, False, t.stride(2)


def _scan_args(
    u, delta, A, B, C, D, z, delta_bias, initial_state, dt_weight, out, last_state, saved,
    *, delta_softplus, reverse, out_scale, accumulate,
):  # fmt: skip
    """Bytes of a ScanArgs, and whatever must stay alive while the kernel runs."""
    batch, seqlen, dim = u.shape
    states = A.shape[1]
    B, of_b, b_constant, b_group = _projection(B)
    C, of_c, c_constant, c_group = _projection(C)
    groups = 1 if b_constant and c_constant else (C if b_constant else B).shape[2]
    (u, of_u), (delta, of_delta), (z, of_z) = _tokens(u), _tokens(delta), _tokens(z)
    A, D, delta_bias, initial_state, dt_weight = map(plain, (A, D, delta_bias, initial_state, dt_weight))
    threads = torch.get_num_threads() if batch * seqlen * dim * states >= _PARALLEL_FROM else 1
    packed = _pack(
        batch, seqlen, dim, states, groups, 0 if dt_weight is None else dt_weight.shape[1],
        delta_softplus, reverse, accumulate, threads, b_constant, c_constant, b_group, c_group, out_scale,
        *of_u, *of_delta, *of_z, *of_b, *of_c, *_tokens(out)[1],
        A.data_ptr(), pointer(D), pointer(delta_bias), pointer(dt_weight), pointer(initial_state),
        pointer(last_state), pointer(saved),
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
    accumulate_into: torch.Tensor | None = None,
    save: bool = False,
    dt_weight: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out (B, L, E), last_state (B, E, N) float32, and the states kept for `backward`; see `selective_scan_ref`.

    Args:
        out_scale: factor of the gated output.
        accumulate_into: (B, L, E), channel stride 1; the output is added to it and it is returned.
        save: keep the state before every chunk of 32 tokens.
        dt_weight: (E, R), see the module's docstring.
        out_dtype: dtype of a new output; u's if None.
    """
    batch, seqlen, dim = u.shape
    states = A.shape[1]
    out = accumulate_into
    if out is None:
        out = u.new_empty((batch, seqlen, dim), dtype=out_dtype)
    last_state = u.new_empty((batch, dim, states), dtype=torch.float32)
    saved = None
    if save:
        groups = B.shape[2] if B.dim() == 4 else C.shape[2] if C.dim() == 4 else 1
        blocks = groups * -(-dim // groups // BLOCK)
        saved = u.new_empty((batch, -(-seqlen // CHUNK), blocks, states, BLOCK), dtype=torch.float32)
    if last_state.numel():
        packed, _alive = _scan_args(
            u, delta, A, B, C, D, z, delta_bias, initial_state, dt_weight, out, last_state, saved,
            delta_softplus=delta_softplus, reverse=reverse, out_scale=out_scale,
            accumulate=accumulate_into is not None,
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
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state), None where the input is None."""
    # Shapes, not empty_like: results are contiguous whatever the strides of the inputs.
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    dz = None if z is None else z.new_empty(z.shape)
    grads = backward_into(
        dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, saved[0], du, ddelta, dz,
        delta_softplus=delta_softplus, reverse=reverse, out_scale=out_scale,
    )  # fmt: skip
    n = A.shape[1]

    def of_projection(t: torch.Tensor, constant: torch.Tensor | None, start: int) -> torch.Tensor:
        if constant is not None:
            return constant.to(t.dtype)
        return grads["dx"][..., start : start + n].to(t.dtype).contiguous()

    return (
        du,
        ddelta,
        grads["dA"],
        of_projection(B, grads["dB"], 0),
        of_projection(C, grads["dC"], n),
        grads["dD"],
        dz,
        grads["dbias"],
        None if initial_state is None else grads["dinitial_state"].to(initial_state.dtype),
    )


def backward_into(
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
    saved: torch.Tensor,
    du: torch.Tensor,
    ddelta: torch.Tensor | None,
    dz: torch.Tensor | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    out_scale: float = 1.0,
    dt_weight: torch.Tensor | None = None,
    accumulate_dz: bool = False,
) -> dict[str, torch.Tensor | None]:
    """The backward kernel with its token-sized outputs given.

    Args:
        du, dz: (B, L, E), channel stride 1, any supported dtype; written, or added to for dz if `accumulate_dz`.
        ddelta: (B, L, E), written; not used with `dt_weight`.

    Returns:
        dA (E, N), dD and dbias (E,), dB and dC (E, N) if constant, dinitial_state (B, E, N), ddt_weight (E, R), and
        dx (B, L, G, R + 2N): the gradients of the low-rank step, of B and of C side by side. All float32.
    """
    batch, seqlen, dim = u.shape
    n = A.shape[1]
    rank = 0 if dt_weight is None else dt_weight.shape[1]
    groups = next((t.shape[2] for t in (B, C) if t.dim() == 4), 1)
    dout, dlast_state = rows(dout), plain(dlast_state)
    new = functools.partial(torch.empty if batch else torch.zeros, dtype=torch.float32, device=u.device)
    grads = {
        "dA": new((dim, n)),
        "dD": None if D is None else new(dim),
        "dbias": None if delta_bias is None else new(dim),
        "dB": new((dim, n)) if B.dim() == 2 else None,
        "dC": new((dim, n)) if C.dim() == 2 else None,
        "dx": new((batch, seqlen, groups, rank + 2 * n)),
        "ddt_weight": new((dim, rank)) if rank else None,
        "dinitial_state": None if initial_state is None else new((batch, dim, n)),
    }
    if not batch:
        return grads
    packed, _alive = _scan_args(
        u, delta, A, B, C, D, z, delta_bias, initial_state, dt_weight, None, None, saved,
        delta_softplus=delta_softplus, reverse=reverse, out_scale=out_scale, accumulate=False,
    )  # fmt: skip
    _backward(
        packed
        + _pack_grad(
            *_tokens(dout)[1], *_tokens(du)[1], *_tokens(ddelta)[1], *_tokens(dz)[1], accumulate_dz,
            pointer(dlast_state),
            *(pointer(grads[k]) for k in ("dinitial_state", "dA", "dD", "dbias", "dB", "dC", "dx", "ddt_weight")),
        )
    )  # fmt: skip
    return grads
