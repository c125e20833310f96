"""The published, channel-first interface of the selective scan and of the mixer around it, on this package's operators.

Legend: B batch, D channels, L tokens, N states, G groups, R rank of the step, W width of the convolution.
"""

import torch
import torch.nn.functional as F

from mamba_ssm_vim.ops.mixer.reference import complex_of, mix_direction
from mamba_ssm_vim.ops.selective_scan import selective_scan
from mamba_ssm_vim.ops.selective_scan import selective_scan_ref as token_major_scan_ref
from mamba_ssm_vim.ops.selective_scan.op import check_arguments

_Optional = torch.Tensor | None


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: _Optional = None,
    z: _Optional = None,
    delta_bias: _Optional = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan, differentiable in every tensor (through the last state too).

    Args:
        u: (B, D, L), channel-first or channel-last in memory; the output has the same layout.
        delta: (B, D, L).
        A: (D, N), real or complex.
        B: constant (D, N), or per token (B, N, L) or (B, G, N, L); for complex A a constant one is complex, and one per
            token holds real and imaginary parts side by side: (B, N, 2L) or (B, G, N, 2L).
        C: like B. For complex A the output is 2 Re(C h).
        D: (D,) or None, the skip.
        z: (B, D, L) or None, the gate.
        delta_bias: (D,) or None, added to delta.
        delta_softplus: the step is softplus(delta + delta_bias).
        return_last_state: also return the state (B, D, N) after the last token, float32 or complex.

    Returns:
        out (B, D, L) in u's dtype, or (out, last state).

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_scan(u, delta, A, B, C, z)
    out, last_state = selective_scan(
        *_token_major(u, delta, A, B, C, D, z, delta_bias), delta_softplus=delta_softplus, return_last_state=True
    )
    out = out.transpose(1, 2)
    if u.stride(2) == 1 and u.stride(1) != 1:
        out = out.contiguous()
    return (out, last_state) if return_last_state else out


def selective_scan_ref(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: _Optional = None,
    z: _Optional = None,
    delta_bias: _Optional = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`selective_scan_fn` in plain PyTorch."""
    _check_scan(u, delta, A, B, C, z)
    tensors = _token_major(u, delta, A, B, C, D, z, delta_bias)
    check_arguments(*tensors, None)
    out, last_state = token_major_scan_ref(*tensors, delta_softplus=delta_softplus)
    return (out.transpose(1, 2), last_state) if return_last_state else out.transpose(1, 2)


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: _Optional,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: _Optional,
    A: torch.Tensor,
    B: _Optional = None,
    C: _Optional = None,
    D: _Optional = None,
    delta_bias: _Optional = None,
    B_proj_bias: _Optional = None,
    C_proj_bias: _Optional = None,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """The Mamba mixer from in_proj's output to out_proj's: convolution, projections, scan, gate, out_proj.

    Args:
        xz: (B, 2D, L): the input in the first D channels, the gate in the last.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,) or None.
        x_proj_weight: (R + N if B is None + N if C is None, D), twice the N for complex A (real, imaginary adjacent).
        delta_proj_weight: (D, R).
        out_proj_weight: (M, D).
        out_proj_bias: (M,) or None.
        A: (D, N), real or complex.
        B, C: constant, as in `selective_scan_fn`, or None: projected from the convolved input.
        D, delta_bias: (D,) or None.
        B_proj_bias, C_proj_bias: (N,) or None, added to a projected B or C.
        delta_softplus: as in `selective_scan_fn`.

    Returns:
        (B, L, M). The arithmetic is done in xz's dtype, autocast or not; out_proj follows autocast.

    Raises:
        ValueError: shapes that do not fit.
    """
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, None, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus,
    )  # fmt: skip
    return _out_proj(y, out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: _Optional,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: _Optional,
    A: torch.Tensor,
    A_b: torch.Tensor,
    B: _Optional = None,
    C: _Optional = None,
    D: _Optional = None,
    delta_bias: _Optional = None,
    B_proj_bias: _Optional = None,
    C_proj_bias: _Optional = None,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """`mamba_inner_fn` with a second scan from the last token to the first, which shares everything but A (`A_b`).

    This is the bidirectional mixer "v1"; the outputs of the two scans are added before out_proj.
    """
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, A_b, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus,
    )  # fmt: skip
    return _out_proj(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: _Optional,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    A: torch.Tensor,
    B: _Optional = None,
    C: _Optional = None,
    D: _Optional = None,
    delta_bias: _Optional = None,
    B_proj_bias: _Optional = None,
    C_proj_bias: _Optional = None,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """`mamba_inner_fn` without out_proj: (B, D, L), the gated scan's output."""
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, None, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus,
    ).transpose(1, 2)  # fmt: skip


# The published references, too, are the operators one after another, whose own reference is `use_backend("reference")`.
mamba_inner_ref = mamba_inner_fn
bimamba_inner_ref = bimamba_inner_fn


class SelectiveScanFn:
    """`selective_scan_fn` under the published name of its autograd function, for code that calls `apply`."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """`mamba_inner_fn` under the published name of its autograd function."""

    apply = staticmethod(mamba_inner_fn)


class MambaInnerFnNoOutProj:
    """`mamba_inner_fn_no_out_proj` under the published name of its autograd function."""

    apply = staticmethod(mamba_inner_fn_no_out_proj)


class BiMambaInnerFn:
    """`bimamba_inner_fn` under the published name of its autograd function."""

    apply = staticmethod(bimamba_inner_fn)


def _check_scan(u, delta, A, B, C, z) -> None:
    """Raise for errors that the token-major functions would report in other shapes, or not at all."""
    if u.dim() != 3 or delta.shape != u.shape or (z is not None and z.shape != u.shape):
        raise ValueError(
            f"u, delta and z must all be (batch, dim, seqlen), got {tuple(u.shape)}, {tuple(delta.shape)} and "
            f"{None if z is None else tuple(z.shape)}"
        )
    if A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(f"A must be (dim, dstate) with dim {u.shape[1]}, got {tuple(A.shape)}")
    seqlen = u.shape[2] * (2 if A.is_complex() else 1)
    for name, t in (("B", B), ("C", C)):
        fits = t.shape == A.shape
        if t.dim() in (3, 4):
            fits = t.shape[0] == u.shape[0] and tuple(t.shape[-2:]) == (A.shape[1], seqlen)
            fits = fits and (t.dim() == 3 or (t.shape[1] > 0 and u.shape[1] % t.shape[1] == 0))
        if not fits:
            raise ValueError(
                f"{name} must be (dim, dstate) = {tuple(A.shape)}, (batch, dstate, seqlen) = "
                f"{(u.shape[0], A.shape[1], seqlen)} or (batch, groups, dstate, seqlen), got {tuple(t.shape)}"
            )


def _token_major(u, delta, A, B, C, D, z, delta_bias) -> tuple[_Optional, ...]:
    """The published arguments of a scan as those of `selective_scan`."""

    def tokens(t):
        # Copied here, once, rather than in a kernel's forward and again in its backward.
        return None if t is None else t.transpose(1, 2).contiguous()

    def projection(t):
        if t.dim() == 2:
            return t
        if t.dim() == 3:
            t = t.unsqueeze(1)
        if A.is_complex():
            t = complex_of(t, A)
        return t.permute(0, 3, 1, 2).contiguous()

    return tokens(u), tokens(delta), A, projection(B), projection(C), D, tokens(z), delta_bias


def _inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, A_b, B, C, D, delta_bias, B_proj_bias,
    C_proj_bias, delta_softplus,
) -> torch.Tensor:  # fmt: skip
    """The gated scan (B, L, D) of xz (B, 2D, L), one operator after another.

    Not by the fused mixer, which rounds the step's projection differently: that is a few units in the last place, but
    the published tests compare outputs of 1e8 with those of the single operators to an absolute 2e-3.
    """
    x, z = xz.transpose(1, 2).contiguous().chunk(2, dim=-1)
    rank, states = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    expected = (rank + states * ((B is None) + (C is None)), x.shape[2])
    if x_proj_weight.shape != expected:
        raise ValueError(f"x_proj_weight must be {expected}, got {tuple(x_proj_weight.shape)}")
    for name, t in (("B", B), ("C", C)):
        if t is not None and t.shape != A.shape:
            raise ValueError(f"{name} must be None or constant, (dim, dstate) = {tuple(A.shape)}, got {tuple(t.shape)}")
    with torch.autocast(xz.device.type, enabled=False):
        return mix_direction(
            x, z, conv1d_weight.squeeze(1), conv1d_bias, x_proj_weight, delta_proj_weight, delta_bias, A, D, False, A_b,
            B, C, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


def _out_proj(y: torch.Tensor, weight: torch.Tensor, bias: _Optional) -> torch.Tensor:
    if torch.is_autocast_enabled(y.device.type):
        return F.linear(y, weight, bias)
    return F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))
