"""The mixer's arithmetic, stated once, from the operators that it is made of.

The mixer operator falls back on it, and token-by-token inference, the published functions, TorchScript and exported
graphs call it. It runs on whichever backend serves the operators; under `use_backend("reference")` it is the
specification that every fused mixer is tested against.

Legend: B batch, L tokens, E inner channels, N states, R rank of dt, W convolution width.

TorchScript compiles these functions, so their parameters are annotated as tensors. In Python a weight of the
convolution or of a projection may also be a module, which is then called in place of the plain product.
"""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from causal_conv1d_vim.conv import causal_conv1d
from torch import nn

from mamba_ssm_vim.ops.selective_scan import selective_scan


@dataclasses.dataclass
class Direction:
    """Parameters of one pass over the tokens.

    Attributes:
        conv_weight: (E, W), or a depthwise `Conv1d` padded by W - 1, which brings its bias.
        conv_bias: (E,) or None.
        x_proj_weight: (R + 2N, E), or a module from E to R + 2N channels; gives dt's low-rank input, B and C.
        dt_proj_weight: (E, R), or a module from R to E channels, which brings its bias.
        dt_bias: (E,), added before softplus; None with a module.
        A: (E, N) float32, negative.
        D: (E,) float32.
        reverse: convolve and scan from the last token to the first.
        A_back: (E, N) float32 or None; a second scan of the same convolved input in the opposite direction, with this
            A and all else shared (the "v1" mixer of arXiv 2401.09417's code).
    """

    conv_weight: torch.Tensor | nn.Module
    conv_bias: torch.Tensor | None
    x_proj_weight: torch.Tensor | nn.Module
    dt_proj_weight: torch.Tensor | nn.Module
    dt_bias: torch.Tensor | None
    A: torch.Tensor
    D: torch.Tensor
    reverse: bool = False
    A_back: torch.Tensor | None = None

    def scans(self) -> list[tuple[str, torch.Tensor, bool]]:
        """(field name of A, A, reverse) of each scan over the convolved input."""
        scans = [("A", self.A, self.reverse)]
        return scans if self.A_back is None else [*scans, ("A_back", self.A_back, not self.reverse)]


FIELDS = tuple(field.name for field in dataclasses.fields(Direction))


def fields_of(p: Direction) -> tuple:
    """A direction's fields in the order of `mix_direction`'s arguments, but for an `A_back` of None."""
    values = tuple(getattr(p, name) for name in FIELDS)
    return values[:-1] if p.A_back is None else values


def transition(A_log: torch.Tensor) -> torch.Tensor:
    """A (E, N) in float32 from the parameter that holds its logarithm."""
    return -torch.exp(A_log.float())


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in) times the weight (out, in) or through the module: (..., out) in x's dtype."""
    if torch.jit.is_scripting():
        return F.linear(x, weight.to(x.dtype))
    elif isinstance(weight, nn.Module):
        return weight(x).to(x.dtype)
    else:
        return F.linear(x, weight.to(x.dtype))


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """SiLU of the causal depthwise convolution of x (B, L, E), or of the anti-causal one if `reverse`."""
    if torch.jit.is_scripting():
        return torch.ops.vision_mamba.causal_conv1d(x, weight, bias, None, True, reverse)
    elif isinstance(weight, nn.Module):
        forwards = x.flip(1) if reverse else x
        u = F.silu(weight(forwards.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2).to(x.dtype)
        return u.flip(1) if reverse else u
    else:
        return causal_conv1d(x, weight, bias, activation="silu", reverse=reverse)


def complex_of(pairs: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """(..., 2N) of adjacent real and imaginary parts as (..., N) in the dtype of a complex A."""
    parts = pairs.to(torch.real(A).dtype).unflatten(-1, [-1, 2])
    return torch.complex(parts[..., 0], parts[..., 1])


def _per_token(projected: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor) -> torch.Tensor:
    """A column slice of x_proj's output, with its bias, as B or C of one group; complex if A is."""
    if bias is not None:
        projected = projected + bias.to(projected.dtype)
    return (complex_of(projected, A) if A.is_complex() else projected).unsqueeze(2)


def select(
    u: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    B_bias: torch.Tensor | None = None,
    C_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the scan selects from its input u (B, L, E): delta (B, L, E) before bias and softplus, B and C (B, L, 1, N).

    Args:
        u: the convolved input.
        x_proj_weight: (R + N for each of B and C that is None, E), twice the N for complex A.
        dt_proj_weight: (E, R).
        A: (E, N), real or complex.
        B, C: constant (E, N), returned as they are, or None.
        B_bias, C_bias: (N,) or None, added to a projected B or C.
    """
    projected = linear(u, x_proj_weight)
    states = A.shape[1] * (2 if A.is_complex() else 1)
    rank = projected.shape[-1] - states * (int(B is None) + int(C is None))
    delta = linear(projected[..., :rank], dt_proj_weight)
    if B is None:
        B = _per_token(projected[..., rank : rank + states], B_bias, A)
    if C is None:
        C = _per_token(projected[..., projected.shape[-1] - states :], C_bias, A)
    return delta, B, C


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    reverse: bool,
) -> torch.Tensor:
    """The selective scan of u (B, L, E), gated by SiLU(z) unless z is None."""
    if torch.jit.is_scripting():
        return torch.ops.vision_mamba.selective_scan(u, delta, A, B, C, D, z, dt_bias, None, softplus, reverse)[0]
    else:
        return selective_scan(u, delta, A, B, C, D, z, dt_bias, delta_softplus=softplus, reverse=reverse)


def mix_direction(
    x: torch.Tensor,
    z: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor | None,
    reverse: bool = False,
    A_back: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    B_bias: torch.Tensor | None = None,
    C_bias: torch.Tensor | None = None,
    softplus: bool = True,
) -> torch.Tensor:
    """One direction: the gated scan (B, L, E) of x, gate z (B, L, E); two scans that share all but A with `A_back`.

    The other arguments are those of `Direction`, and of `select` for what the published functions add.
    """
    u = convolve(x, conv_weight, conv_bias, reverse)
    delta, B_t, C_t = select(u, x_proj_weight, dt_proj_weight, A, B, C, B_bias, C_bias)
    out = scan(u, delta, A, B_t, C_t, D, z, dt_bias, softplus, reverse)
    if A_back is not None:
        out = out + scan(u, delta, A_back, B_t, C_t, D, z, dt_bias, softplus, not reverse)
    return out


def mixer_ref(xz: torch.Tensor, directions: list[Direction], *, scale: float = 1.0) -> torch.Tensor:
    """Sum over the directions, times `scale`; arguments and result are those of `mixer`."""
    x, z = xz.chunk(2, dim=-1)
    out = None
    with projections_in_own_dtype(xz, directions):
        for direction in directions:
            mixed = mix_direction(x, z, *fields_of(direction))
            out = mixed if out is None else out + mixed
    return out if scale == 1.0 else out * scale


def calls_modules(directions: list[Direction]) -> bool:
    """Whether a direction has a module in place of a weight, which no fused kernel can call."""
    for p in directions:
        for weight in (p.conv_weight, p.x_proj_weight, p.dt_proj_weight):
            if isinstance(weight, nn.Module):
                return True
    return False


def projections_in_own_dtype(x: torch.Tensor, directions: list[Direction]) -> contextlib.AbstractContextManager:
    """Context in which projections run in the dtype of their input x whatever autocast would choose, as a fused
    kernel's do; a module among them finds autocast as it is, since its parameters may be of another dtype."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device) or calls_modules(directions):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
