"""Position embeddings resampled to another patch grid."""

import logging
import math

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from vim.models.layout import join_tokens, special_positions, split_tokens, token_layout

_logger = logging.getLogger("vision_mamba")


def infer_grid(num_patches: int) -> tuple[int, int]:
    """The square grid of `num_patches` patches.

    Raises:
        ValueError: the number is not a square, so the grid must be given.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} position embeddings do not form a square grid: give the grid they come from")
    return side, side


def resample_pos_embed(
    pos_embed: torch.Tensor,
    new_grid: tuple[int, int],
    *,
    class_token: str,
    old_grid: tuple[int, int] | None = None,
    new_class_token: str | None = None,
    antialias: bool = True,
) -> torch.Tensor:
    """Position embeddings of another patch grid: bicubic for the patches, class rows carried over.

    Args:
        pos_embed: (1, T, D), class rows included where `class_token` puts them.
        new_grid: rows and columns of the result.
        class_token: where the class rows are, see `special_positions`.
        old_grid: rows and columns of `pos_embed`; None means square, which is logged.
        new_class_token: where they shall be; None keeps the kind, "none" drops them.
        antialias: widen the kernel where the grid shrinks. It is another kernel where the grid grows, too.

    Returns:
        (1, new T, D); the very values where the grid is the same.

    Raises:
        ValueError: the rows of `pos_embed` do not fit the grid, or it lacks the class rows.
    """
    num_patches = pos_embed.shape[1] - len(special_positions(class_token, 0, 0))
    if old_grid is None:
        old_grid = infer_grid(num_patches)
        if old_grid != tuple(new_grid):
            _logger.warning(
                "the position embedding does not say which grid its %d patches form: taken for a square of %d × %d",
                num_patches, *old_grid,
            )  # fmt: skip
    if old_grid[0] * old_grid[1] != num_patches:
        raise ValueError(f"{num_patches} position embeddings of patches do not fit a grid of {old_grid}")
    return resample_grid(pos_embed, new_grid, old_grid, class_token, new_class_token or class_token, antialias)


def resample_grid(
    pos_embed: torch.Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    class_token: str,
    new_class_token: str,
    antialias: bool,
) -> torch.Tensor:
    """`resample_pos_embed` with everything given, in the subset of Python that TorchScript compiles."""
    class_rows, patches = split_tokens(pos_embed, token_layout(class_token, 0, old_grid, 1))
    if old_grid[0] != new_grid[0] or old_grid[1] != new_grid[1]:
        patches = resample_abs_pos_embed(
            patches, [new_grid[0], new_grid[1]], [old_grid[0], old_grid[1]], num_prefix_tokens=0, antialias=antialias
        )
    layout = token_layout(new_class_token, 0, new_grid, 1)
    if len(layout.positions) > class_rows.shape[1]:
        raise ValueError(
            f"the position embedding has {class_rows.shape[1]} class rows ({class_token}), {new_class_token} needs "
            f"{len(layout.positions)}"
        )
    return join_tokens(class_rows[:, : len(layout.positions)], patches, layout)


def resample_frames(temporal_pos_embed: torch.Tensor, frames: int) -> torch.Tensor:
    """Temporal position embedding (1, T, D) of another number of frames, linear in time."""
    if temporal_pos_embed.shape[1] == frames:
        return temporal_pos_embed
    return F.interpolate(temporal_pos_embed.transpose(1, 2), size=[frames], mode="linear").transpose(1, 2)
