"""Where class tokens sit among the patch tokens, and position embeddings resampled to another grid."""

import math

import torch
from timm.layers import resample_abs_pos_embed

CLASS_TOKENS = ("none", "head", "middle", "double")


def class_positions(class_token: str, num_patches: int) -> list[int]:
    """Indices of the class tokens in the sequence that holds them and `num_patches` patch tokens.

    Args:
        class_token: "none", "head" (first), "middle" (index num_patches // 2) or "double" (first and last).
        num_patches: number M of patch tokens.
    """
    positions: list[int] = []
    if class_token == "head" or class_token == "double":
        positions.append(0)
    if class_token == "middle":
        positions.append(num_patches // 2)
    if class_token == "double":
        positions.append(num_patches + 1)
    return positions


def split_class_tokens(tokens: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D) → class tokens (B, len(positions), D) and patch tokens (B, T - len(positions), D).

    Args:
        tokens: the sequence.
        positions: increasing indices of the class tokens in it.
    """
    if len(positions) == 0:
        return tokens[:, :0], tokens
    class_tokens, pieces, start = [tokens[:, :0]], [tokens[:, :0]], 0
    for position in positions:
        class_tokens.append(tokens[:, position : position + 1])
        pieces.append(tokens[:, start:position])
        start = position + 1
    pieces.append(tokens[:, start:])
    return torch.cat(class_tokens, dim=1), torch.cat(pieces, dim=1)


def insert_class_tokens(patches: torch.Tensor, class_tokens: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """The inverse of `split_class_tokens`: patches (B, M, D) and class tokens (B, K, D) → (B, M + K, D)."""
    pieces, start = [patches[:, :0]], 0
    for k, position in enumerate(positions):
        end = position - k
        pieces.append(patches[:, start:end])
        pieces.append(class_tokens[:, k : k + 1])
        start = end
    pieces.append(patches[:, start:])
    return torch.cat(pieces, dim=1)


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
) -> torch.Tensor:
    """Position embeddings of another patch grid: antialiased bicubic for the patches, class rows carried over.

    Args:
        pos_embed: (1, T, D), class rows included where `class_token` puts them.
        new_grid: rows and columns of patches wanted.
        class_token: where the class rows are, see `class_positions`.
        old_grid: rows and columns that `pos_embed` stands for; None means square.
        new_class_token: where they shall be; None keeps the kind, "none" drops them.

    Returns:
        (1, new T, D); the very values where the grid is the same.

    Raises:
        ValueError: the rows of `pos_embed` do not fit the grid, or class rows are asked for that are not there.
    """
    num_patches = pos_embed.shape[1] - len(class_positions(class_token, 0))
    if old_grid is None:
        old_grid = infer_grid(num_patches)
    if old_grid[0] * old_grid[1] != num_patches:
        raise ValueError(f"{num_patches} position embeddings of patches do not fit a grid of {old_grid}")
    return resample_grid(pos_embed, new_grid, old_grid, class_token, new_class_token or class_token)


def resample_grid(
    pos_embed: torch.Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    class_token: str,
    new_class_token: str,
) -> torch.Tensor:
    """`resample_pos_embed` with everything given, in the subset of Python that TorchScript compiles."""
    num_patches = old_grid[0] * old_grid[1]
    class_rows, patches = split_class_tokens(pos_embed, class_positions(class_token, num_patches))
    if old_grid[0] != new_grid[0] or old_grid[1] != new_grid[1]:
        patches = resample_abs_pos_embed(
            patches, [new_grid[0], new_grid[1]], [old_grid[0], old_grid[1]], num_prefix_tokens=0
        )
    positions = class_positions(new_class_token, new_grid[0] * new_grid[1])
    if len(positions) > class_rows.shape[1]:
        raise ValueError(
            f"the position embedding has {class_rows.shape[1]} class rows ({class_token}), {new_class_token} needs "
            f"{len(positions)}"
        )
    return insert_class_tokens(patches, class_rows[:, : len(positions)], positions)
