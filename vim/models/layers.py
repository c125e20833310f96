"""The block of Vision Mamba.

Legend: B batch, L tokens, D model width, E inner width of the mixer.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from mamba_ssm_vim import Mamba, RMSNorm, add_norm
from mamba_ssm_vim.modules.plain import is_plain
from timm.layers import DropPath
from timm.models import register_notrace_function, register_notrace_module
from torch import nn

from vim.models.layout import TokenLayout, split_tokens, to_map
from vim.models.mixers import GridMixer


@register_notrace_function
def stream_dtype(hidden: torch.Tensor, residual: torch.Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """Type of the residual stream after `hidden` is added to it."""
    dtype = hidden.dtype if residual is None else residual.dtype
    if residual_in_fp32:
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype


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
    dtype = stream_dtype(hidden, residual, residual_in_fp32)
    if torch.jit.is_scripting():
        normed = torch.ops.vision_mamba.add_norm(hidden, residual, weight, bias, eps, rms, dtype)
        return normed[0], normed[1]
    else:
        return add_norm(hidden, residual, weight, bias, eps=eps, rms=rms, residual_dtype=dtype)


def apply_norm(
    norm: nn.Module, hidden: torch.Tensor, residual: torch.Tensor | None, residual_in_fp32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual_norm` with a module, which is called if it is more than its parameters (see `is_plain`)."""
    if is_plain(norm):
        rms = isinstance(norm, RMSNorm)
        return residual_norm(hidden, residual, norm.weight, norm.bias, norm.eps, rms, residual_in_fp32)
    stream = hidden.to(stream_dtype(hidden, residual, residual_in_fp32))
    if residual is not None:
        stream = stream + residual
    own = next(norm.parameters(), stream)
    return norm(stream.to(own.dtype)).to(hidden.dtype), stream


def refuse_merged(merged: bool) -> None:
    """Raise if tokens are merged, in one sentence for all ways of taking feature maps.

    Raises:
        ValueError: they are.
    """
    if merged:
        raise ValueError("merged tokens have no grid, so there are no feature maps: build it with merge_ratio=0")


@register_notrace_module
class FeatureMap(nn.Module):
    """The feature map after a block, as a module: hooks and graphs of torch.fx find it by its name.

    The model calls it only for these (`wanted`), so that it costs nothing otherwise.
    """

    def __init__(self, clip: bool, column_major: bool, merged: bool) -> None:
        super().__init__()
        self.clip, self.column_major, self.merged = clip, column_major, merged

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """hidden and residual (B, L, D) after the block → (B, D, rows, columns), of a clip (B, D, frames, ...).

        Raises:
            ValueError: tokens are merged.
        """
        refuse_merged(self.merged)
        return to_map(split_tokens(residual + hidden, layout)[1], layout, self.clip, self.column_major)

    @torch.jit.ignore
    def wanted(self, hidden: Any, whole: bool) -> bool:
        """Whether somebody takes the map from the module, a hook or a tracer of torch.fx.

        Args:
            hidden: what the map would be of.
            whole: the block has a map; the first one of a pair has none.
        """
        hooked = self.__dict__["_forward_hooks"] or self.__dict__["_forward_pre_hooks"]
        return whole and (bool(hooked) or (isinstance(hidden, torch.fx.Proxy) and not self.merged))


class MixerBlock(nn.Module):
    """What the blocks share: a mixer and its stochastic depth. A backbone adds its `FeatureMap` as `map`."""

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
                parameter.copy_(torch.arange(1, mixer.d_state + 1, dtype=torch.float32, device=parameter.device).log())
            else:  # D, D_b, gamma
                parameter.fill_(mixer.init_layer_scale if name == "gamma" else 1.0)
        for name, module in mixer.named_children():
            if name.startswith("dt_proj"):
                mixer._init_dt_proj(module)

    def mix(self, hidden: torch.Tensor, layout: TokenLayout | None) -> torch.Tensor:
        """The mixer's output (B, L, D) for normalised tokens (B, L, D)."""
        if self.follows_grid:
            return self.mixer(hidden, layout)
        elif torch.jit.is_scripting():
            return self.mixer.forward_of_weights(hidden)
        else:
            return self.mixer(hidden)


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
        if torch.jit.is_scripting():
            hidden, stream = residual_norm(
                hidden, residual, self.norm.weight, self.norm.bias, self.norm.eps, self.rms, self.residual_in_fp32
            )
        else:
            hidden, stream = apply_norm(self.norm, hidden, residual, self.residual_in_fp32)
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
        if torch.jit.is_scripting():
            hidden, stream = residual_norm(
                hidden, residual, self.norm1.weight, self.norm1.bias, self.norm1.eps, self.rms, self.residual_in_fp32
            )
        else:
            hidden, stream = apply_norm(self.norm1, hidden, residual, self.residual_in_fp32)
        hidden = self.drop_path(self.mix(hidden, layout))
        if torch.jit.is_scripting():
            hidden, stream = residual_norm(
                hidden, stream, self.norm2.weight, self.norm2.bias, self.norm2.eps, self.rms, self.residual_in_fp32
            )
        else:
            hidden, stream = apply_norm(self.norm2, hidden, stream, self.residual_in_fp32)
        return self.drop_path(self.mlp(hidden)), stream
