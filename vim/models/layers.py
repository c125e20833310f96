"""The block of Vision Mamba.

Legend: B batch, L tokens, D model width, E inner width of the mixer.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from mamba_ssm_vim import Mamba, RMSNorm, add_norm
from timm.layers import DropPath
from timm.models import register_notrace_function, register_notrace_module
from torch import nn

from vim.models.layout import TokenLayout
from vim.models.mixers import GridMixer
from vim.models.watching import operators_are_watched


@register_notrace_function
def residual_norm(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    residual_in_fp32: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add hidden (B, L, D) to the residual stream and normalise: the normalised sum, and the new stream.

    Args:
        hidden: output of a mixer, or the embedded tokens.
        residual: the stream, or None at its beginning.
        weight, bias, eps: of the norm.
        rms: RMSNorm, else LayerNorm.
        residual_in_fp32: the stream is float32 (float64 in a model of that type), else of hidden's type.
    """
    dtype = hidden.dtype if residual is None else residual.dtype
    if residual_in_fp32:
        dtype = torch.promote_types(dtype, torch.float32)
    if torch.jit.is_scripting() or operators_are_watched(hidden):
        normed = torch.ops.vision_mamba.add_norm(hidden, residual, weight, bias, eps, rms, dtype)
        return normed[0], normed[1]
    else:
        return add_norm(hidden, residual, weight, bias, eps=eps, rms=rms, residual_dtype=dtype)


class MixerBlock(nn.Module):
    """What the blocks share: a mixer and its stochastic depth."""

    follows_grid: Final[bool]

    def __init__(self, mixer: Mamba, drop_path: float, residual_in_fp32: bool) -> None:
        super().__init__()
        self.mixer, self.follows_grid, self.residual_in_fp32 = mixer, isinstance(mixer, GridMixer), residual_in_fp32
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise everything as when it was built."""
        mixer = self.mixer
        for module in self.modules():
            if module is not self and module is not mixer and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, parameter in mixer.named_parameters(recurse=False):
            if name.endswith("_log"):
                parameter.copy_(torch.arange(1, mixer.d_state + 1, device=parameter.device).log())
            else:  # D, D_b, gamma
                parameter.fill_(mixer.init_layer_scale if name == "gamma" else 1.0)
        for name, module in mixer.named_children():
            if name.startswith("dt_proj"):
                mixer._init_dt_proj(module)

    def mix(self, hidden: torch.Tensor, layout: TokenLayout | None) -> torch.Tensor:
        """The mixer's output (B, L, D) for normalised tokens (B, L, D)."""
        if self.follows_grid:
            return self.mixer(hidden, layout)
        elif torch.jit.is_scripting() or operators_are_watched(hidden):
            return self._mixer_of_operators(hidden)
        else:
            return self.mixer(hidden)

    def _mixer_of_operators(self, hidden: torch.Tensor) -> torch.Tensor:
        """`Mamba.forward` from registered operators only."""
        m = self.mixer
        x, z = m.in_proj(hidden).chunk(2, dim=-1)
        out = _scripted_direction(
            x, z, m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight, m.dt_proj.bias,
            m.A_log, m.D, [False],
        )  # fmt: skip
        if hasattr(m, "conv1d_b"):
            out = out + _scripted_direction(
                x, z, m.conv1d_b.weight, m.conv1d_b.bias, m.x_proj_b.weight, m.dt_proj_b.weight, m.dt_proj_b.bias,
                m.A_b_log, m.D_b, [True],
            )  # fmt: skip
            if m.if_divide_out:
                out = out * 0.5
        elif hasattr(m, "A_b_log"):
            # "v1": the forward convolution and projections, scanned backwards with a transition of its own.
            out = out + _scripted_direction(
                x, z, m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight, m.dt_proj.bias,
                m.A_b_log, m.D, [False, True],
            )  # fmt: skip
        out = F.linear(out, m.out_proj.weight, m.out_proj.bias)
        if hasattr(m, "gamma"):
            out = out * m.gamma
        return out


@register_notrace_module
class Block(MixerBlock):
    """Residual add and norm, then the mixer; the residual stream is carried beside the hidden states."""

    def __init__(self, mixer: Mamba, norm: nn.Module, drop_path: float, residual_in_fp32: bool) -> None:
        super().__init__(mixer, drop_path, residual_in_fp32)
        self.norm, self.rms = norm, isinstance(norm, RMSNorm)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (B, L, D) and residual (B, L, D) or None → the same pair after this block.

        A mixer that follows the patch grid needs the `layout` of the sequence.
        """
        if residual is not None:
            hidden = self.drop_path(hidden)
        hidden, stream = residual_norm(
            hidden, residual, self.norm.weight, self.norm.bias, self.norm.eps, self.rms, self.residual_in_fp32
        )
        return self.mix(hidden, layout), stream


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x) with biases (arXiv 2002.05202), under ARM's parameter names."""

    def __init__(self, dim: int, hidden_dim: int, **factory: Any) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden_dim, **factory), nn.Linear(dim, hidden_dim, **factory)
        self.w3 = nn.Linear(hidden_dim, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) → (B, L, D)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


@register_notrace_module
class MlpBlock(MixerBlock):
    """A mixer and a SwiGLU, each on the normalised residual stream (ARM, arXiv 2406.07537).

    The stream is carried beside the hidden states as in `Block`; stochastic depth acts within the block.
    """

    def __init__(
        self, mixer: Mamba, norms: tuple[nn.Module, nn.Module], mlp: nn.Module, drop_path: float, residual_in_fp32: bool
    ) -> None:
        super().__init__(mixer, drop_path, residual_in_fp32)
        self.norm1, self.norm2 = norms
        self.mlp, self.rms = mlp, isinstance(self.norm1, RMSNorm)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (B, L, D) and residual (B, L, D) or None → the same pair after this block."""
        hidden, stream = residual_norm(
            hidden, residual, self.norm1.weight, self.norm1.bias, self.norm1.eps, self.rms, self.residual_in_fp32
        )
        hidden, stream = residual_norm(
            self.drop_path(self.mix(hidden, layout)), stream, self.norm2.weight, self.norm2.bias, self.norm2.eps,
            self.rms, self.residual_in_fp32,
        )  # fmt: skip
        return self.drop_path(self.mlp(hidden)), stream


def _scripted_direction(
    x: torch.Tensor,
    z: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    reverse: list[bool],
) -> torch.Tensor:
    """Gated scan of the convolved x (B, L, E); `reverse` holds the direction of the convolution, then the scan's."""
    x = torch.ops.vision_mamba.causal_conv1d(x, conv_weight.squeeze(1), conv_bias, None, True, reverse[0])
    rank, states = dt_proj_weight.shape[1], A_log.shape[1]
    dt, B, C = F.linear(x, x_proj_weight.to(x.dtype)).split([rank, states, states], dim=-1)
    delta = F.linear(dt, dt_proj_weight.to(x.dtype))
    scanned = torch.ops.vision_mamba.selective_scan(
        x, delta, -torch.exp(A_log.float()), B.unsqueeze(2), C.unsqueeze(2), D.float(), z, dt_bias.float(), None, True,
        reverse[-1],
    )  # fmt: skip
    return scanned[0]
