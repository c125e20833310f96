"""The position of every token in a sequence: patches in raster order, class tokens and registers among them.

Plain functions of tensors in the subset of Python that TorchScript compiles. They branch on shapes, so torch.fx takes
them as leaves (timm's `register_notrace_function`).
"""

from typing import NamedTuple

import torch
from timm.models import register_notrace_function


class TokenLayout(NamedTuple):
    """The layout of one sequence of L = frames * rows * columns + len(positions) tokens.

    Attributes:
        grid: rows and columns of the patches of a frame.
        frames: frames of a clip after the patch embedding; 1 for an image.
        positions: increasing indices of the special tokens.
    """

    grid: tuple[int, int]
    frames: int
    positions: list[int]


def special_positions(placement: str, count: int, num_patches: int) -> list[int]:
    """Indices of the special tokens in the sequence that holds them and the patch tokens.

    Args:
        placement: "none", "head" (first), "middle" (index num_patches // 2), "double" (first and last) or "spread"
            (a token after each of `count` equal segments, the remaining patches at the end; arXiv 2405.14858).
        count: number of tokens for "spread".
        num_patches: number M of patch tokens.
    """
    positions: list[int] = []
    if placement == "head" or placement == "double":
        positions.append(0)
    if placement == "middle":
        positions.append(num_patches // 2)
    if placement == "double":
        positions.append(num_patches + 1)
    if placement == "spread":
        segment = num_patches // (count + 1)
        positions = [segment + k * (segment + 1) for k in range(count)]
    return positions


@register_notrace_function
def token_layout(placement: str, count: int, grid: tuple[int, int], frames: int) -> TokenLayout:
    """The layout of a sequence with special tokens at `special_positions`."""
    return TokenLayout(grid, frames, special_positions(placement, count, frames * grid[0] * grid[1]))


@register_notrace_function
def split_tokens(tokens: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence (B, L, D) → special tokens (B, K, D) and patch tokens (B, L - K, D)."""
    if len(layout.positions) == 0:
        return tokens[:, :0], tokens
    special, pieces, start = [tokens[:, :0]], [tokens[:, :0]], 0
    for position in layout.positions:
        special.append(tokens[:, position : position + 1])
        pieces.append(tokens[:, start:position])
        start = position + 1
    pieces.append(tokens[:, start:])
    return torch.cat(special, dim=1), torch.cat(pieces, dim=1)


@register_notrace_function
def join_tokens(special: torch.Tensor, patches: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The inverse of `split_tokens`: special tokens (B, K, D) and patch tokens (B, M, D) → (B, M + K, D)."""
    if len(layout.positions) == 0:
        return patches
    pieces, start = [patches[:, :0]], 0
    for k, position in enumerate(layout.positions):
        end = position - k
        pieces.append(patches[:, start:end])
        pieces.append(special[:, k : k + 1])
        start = end
    pieces.append(patches[:, start:])
    return torch.cat(pieces, dim=1)


@register_notrace_function
def to_map(patches: torch.Tensor, layout: TokenLayout, clip: bool, column_major: bool) -> torch.Tensor:
    """Patch tokens (B, M, D) → feature map (B, D, rows, columns), of a clip (B, D, frames, rows, columns).

    Args:
        patches: patch tokens.
        layout: of their sequence.
        clip: keep the axis of frames.
        column_major: the tokens are in column order, and `layout.grid` counts columns first.
    """
    features = patches.transpose(1, 2).unflatten(2, [layout.frames, layout.grid[0], layout.grid[1]])
    if column_major:
        features = features.transpose(3, 4)
    return features.contiguous() if clip else features.squeeze(2).contiguous()
