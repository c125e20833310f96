"""Patches to tokens, for images and clips of any size.

Legend: B batch, C channels, T frames of a clip, D model width, M patch tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mamba_ssm_vim.modules.plain import is_plain
from timm.layers import resample_patch_embed, to_2tuple
from timm.models import register_notrace_module
from torch import nn

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


@register_notrace_module
class PatchEmbed(nn.Module):
    """Patch convolution with a stride of its own: (B, C, H, W) → tokens (B, M, D) in raster order.

    With `tubelet` the input is a clip (B, C, T, H, W), cut into pieces of that many frames, and the tokens of one piece
    follow those of the piece before. timm's module of this name has no stride beside the patch size, and no time.

    Args:
        img_size, patch_size, stride: pixels, or (height, width).
        channels: colour channels C.
        embed_dim: width D.
        tubelet: frames of a patch; 0 for images.
        pad: pad images with zeros at the right and the bottom until the patches divide them.
        column_major: tokens in column order: `grid_size` then counts columns first.

    Raises:
        ValueError: a size that is none, or an image smaller than a patch.
    """

    def __init__(
        self,
        img_size: Any,
        patch_size: Any,
        stride: Any,
        channels: int,
        embed_dim: int,
        *,
        tubelet: int = 0,
        pad: bool = False,
        column_major: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride = checked_size("patch_size", patch_size), checked_size("stride", stride)
        self.tubelet, self.pad, self.column_major = tubelet, pad, column_major
        if pad and self.stride != self.patch_size:
            raise ValueError(f"padded images need a stride equal to the patch size, got {stride} and {patch_size}")
        self.img_size = checked_size("img_size", img_size, (1, 1) if pad else self.patch_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        if tubelet:
            kernel, steps = (tubelet, *self.patch_size), (tubelet, *self.stride)
            self.proj: nn.Module = nn.Conv3d(channels, embed_dim, kernel, steps, **factory)
        else:
            self.proj = nn.Conv2d(channels, embed_dim, self.patch_size, self.stride, **factory)

    @property
    def num_patches(self) -> int:
        """Patches of an image of the module's size."""
        return self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image (height, width) no smaller than a patch, slower axis first."""
        if self.pad:
            rows, columns = -(-img_size[0] // self.patch_size[0]), -(-img_size[1] // self.patch_size[1])
        else:
            rows = (img_size[0] - self.patch_size[0]) // self.stride[0] + 1
            columns = (img_size[1] - self.patch_size[1]) // self.stride[1] + 1
        return (columns, rows) if self.column_major else (rows, columns)

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        """Pixels per token along each axis."""
        return max(self.stride) if as_scalar else self.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), or a clip (B, C, T, H, W), → (B, M, D).

        Raises:
            ValueError: the image is smaller than a patch.
        """
        height, width = x.shape[-2], x.shape[-1]
        if self.pad:
            x = F.pad(x, (0, -width % self.patch_size[1], 0, -height % self.patch_size[0]))
        elif height < self.patch_size[0] or width < self.patch_size[1]:
            raise ValueError(f"images of {height} × {width} are smaller than the patch size {self.patch_size}")
        if not torch.jit.is_scripting() and x.is_cuda and self._is_matrix_product():
            return self._multiply(x)
        x = self.proj(x)
        if self.column_major:
            x = x.transpose(-2, -1)
        return x.flatten(2).transpose(1, 2)

    @torch.jit.unused
    def _is_matrix_product(self) -> bool:
        return not self.tubelet and self.stride == self.patch_size and is_plain(self.proj)

    @torch.jit.unused
    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of patches that do not overlap as a matrix product, which GPUs do far faster."""
        (patch_height, patch_width), (height, width) = self.patch_size, x.shape[-2:]
        rows, columns = height // patch_height, width // patch_width
        x = x[..., : rows * patch_height, : columns * patch_width]
        x = x.unflatten(3, (columns, patch_width)).unflatten(2, (rows, patch_height))
        order = (0, 4, 2, 1, 3, 5) if self.column_major else (0, 2, 4, 1, 3, 5)
        return F.linear(x.permute(order).flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)

    @torch.jit.ignore
    def resized(self, patch_size: tuple[int, int], img_size: tuple[int, int]) -> "PatchEmbed":
        """This module with its filters resampled to another patch size; the stride follows if it was the patch size."""
        weight, stride = self.proj.weight, patch_size if self.stride == self.patch_size else self.stride
        new = PatchEmbed(
            img_size, patch_size, stride, weight.shape[1], weight.shape[0], tubelet=self.tubelet, pad=self.pad,
            column_major=self.column_major, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        filters = weight.data.flatten(1, -3)  # the frames of a tubelet are resampled as channels are
        new.proj.weight.data.copy_(resample_patch_embed(filters, list(patch_size)).view_as(new.proj.weight))
        new.proj.bias.data.copy_(self.proj.bias.data)
        return new.requires_grad_(weight.requires_grad).train(self.training)
