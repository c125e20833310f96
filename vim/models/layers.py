"""Patch embedding and block of Vision Mamba.

Legend: B batch, M patch tokens, L = M + class tokens, D model width, E inner width of the mixer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mamba_ssm_vim import Mamba, RMSNorm, add_norm
from timm.layers import DropPath, to_2tuple
from timm.models import register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:  # timm's record of a model's size, for its data configuration and its export; older versions keep none
    from timm.models._input import update_model_input_size
except ImportError:
    update_model_input_size = None


def checked_size(name: str, value: Any, least: Sequence[int] = (1, 1)) -> tuple[int, int]:
    """(height, width) from a side or a pair.

    Raises:
        ValueError: not a whole number or two of them, or smaller than `least`.
    """
    size = to_2tuple(value) if isinstance(value, (int, tuple, list)) else ()
    if len(size) != 2 or any(
        not isinstance(s, int) or isinstance(s, bool) or s < m for s, m in zip(size, least, strict=True)
    ):
        at_least = f", each at least the patch size {tuple(least)}" if tuple(least) != (1, 1) else " of at least 1"
        raise ValueError(f"{name} is {value!r}: expected pixels or (height, width){at_least}")
    return size[0], size[1]


def checked_indices(depth: int, pairs: bool, indices: int | list[int] | None) -> tuple[list[int], int]:
    """The blocks that `indices` names, and the last of them (the last of all for pairs counted from the end).

    Args:
        depth: number of blocks.
        pairs: blocks work in pairs, so only every second one has features.
        indices: how many of the last ones, which ones, or None for all.

    Raises:
        ValueError: blocks that there are not, or the first of a pair.
    """
    last_ones = indices is None or isinstance(indices, int)
    if pairs and last_ones:
        odd = list(range(1, depth, 2))
        if indices is not None and not 0 < indices <= len(odd):
            raise ValueError(f"indices is {indices!r}, but the model has {len(odd)} pairs of blocks")
        return (odd if indices is None else odd[-indices:]), depth - 1
    try:
        if isinstance(indices, int) and indices < 1:
            raise AssertionError
        take, last = feature_take_indices(depth, indices if last_ones else list(indices))
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"indices is {indices!r}: expected how many of the last blocks (1 to {depth}), a list of blocks from "
            f"{-depth} to {depth - 1}, or None"
        ) from error
    if pairs and any(i % 2 == 0 for i in take):
        raise ValueError(f"blocks work in pairs (if_bidirectional), so indices must be odd, got {take}")
    return take, last


@register_notrace_module
class PatchEmbed(nn.Module):
    """Patch convolution with a stride of its own: (B, C, H, W) → tokens (B, M, D) in raster order.

    timm's module of this name has no stride beside the patch size.

    Args:
        img_size, patch_size, stride: pixels, or (height, width).
        channels: colour channels C.
        embed_dim: width D.

    Raises:
        ValueError: a size that is none, or an image smaller than a patch.
    """

    def __init__(
        self, img_size: Any, patch_size: Any, stride: Any, channels: int, embed_dim: int, **factory: Any
    ) -> None:
        super().__init__()
        self.patch_size, self.stride = checked_size("patch_size", patch_size), checked_size("stride", stride)
        self.img_size = checked_size("img_size", img_size, self.patch_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.proj = nn.Conv2d(channels, embed_dim, self.patch_size, self.stride, **factory)

    @property
    def num_patches(self) -> int:
        """Patches of an image of the module's size."""
        return self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image (height, width) no smaller than a patch."""
        rows = (img_size[0] - self.patch_size[0]) // self.stride[0] + 1
        return rows, (img_size[1] - self.patch_size[1]) // self.stride[1] + 1

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        """Pixels per token along each axis."""
        return max(self.stride) if as_scalar else self.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, M, D).

        Raises:
            ValueError: the image is smaller than a patch.
        """
        if x.shape[2] < self.patch_size[0] or x.shape[3] < self.patch_size[1]:
            raise ValueError(f"images of {x.shape[2]} × {x.shape[3]} are smaller than the patch size {self.patch_size}")
        return self.proj(x).flatten(2).transpose(1, 2)


@torch.jit.unused
def operators_are_watched(x: torch.Tensor) -> bool:
    """Whether somebody needs to see registered operators, which eager calls bypass for speed.

    The meta device computes shapes with them, `torch.jit.trace` records them, and a dispatch mode (FLOP counter, fake
    tensors) counts or replaces them.
    """
    return x.is_meta or torch.jit.is_tracing() or (not torch.compiler.is_compiling() and is_in_torch_dispatch_mode())


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


@register_notrace_module
class Block(nn.Module):
    """Residual add and norm, then the mixer; the residual stream is carried beside the hidden states."""

    def __init__(self, mixer: Mamba, norm: nn.Module, drop_path: float, residual_in_fp32: bool) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, norm
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.residual_in_fp32, self.rms = residual_in_fp32, isinstance(norm, RMSNorm)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise norm and mixer as when they were built."""
        self.norm.reset_parameters()
        mixer = self.mixer
        for module in mixer.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                module.reset_parameters()
        for name, parameter in mixer.named_parameters(recurse=False):
            if name in ("A_log", "A_b_log"):
                states = torch.arange(1, mixer.d_state + 1, dtype=torch.float32, device=parameter.device)
                parameter.copy_(states.log())
            else:  # D, D_b, gamma
                parameter.fill_(mixer.init_layer_scale if name == "gamma" else 1.0)
        for name in ("dt_proj", "dt_proj_b"):
            if hasattr(mixer, name):
                mixer._init_dt_proj(getattr(mixer, name))

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (B, L, D) and residual (B, L, D) or None → the same pair after this block."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        hidden, stream = residual_norm(
            hidden, residual, self.norm.weight, self.norm.bias, self.norm.eps, self.rms, self.residual_in_fp32
        )
        if torch.jit.is_scripting() or operators_are_watched(hidden):
            return self._mixer_of_operators(hidden), stream
        else:
            return self.mixer(hidden), stream

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
