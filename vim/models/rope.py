"""Two-dimensional rotary position embedding over the patch grid (arXiv 2104.09864, applied per axis)."""

import torch
from torch import nn


def rotary_tables(
    dim: int,
    grid: tuple[int, int],
    pretrain_side: int,
    theta: float = 10000.0,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine tables (rows * columns, dim): the first half of the channels turns with the row, the rest with
    the column. Positions are scaled so that any grid spans the `pretrain_side` of training.

    Args:
        dim: channels, a multiple of 4.
        grid: rows and columns of patches.
        pretrain_side: side of the grid that the frequencies were trained on.
        theta: base of the frequencies.
        device: where to put them; None is torch's default device.
    """
    half = dim // 2
    frequencies = torch.pow(theta, -torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    rows = _angles(grid[0], frequencies, pretrain_side)[:, None].expand(grid[0], grid[1], half)
    columns = _angles(grid[1], frequencies, pretrain_side)[None].expand(grid[0], grid[1], half)
    table = torch.cat([rows, columns], dim=-1).reshape(grid[0] * grid[1], dim)
    return table.cos(), table.sin()


def _angles(count: int, frequencies: torch.Tensor, pretrain_side: int) -> torch.Tensor:
    """Angles (count, 2 * frequencies) of positions 0 to count - 1, each twice: for both channels of a pair."""
    steps = torch.arange(count, dtype=torch.float32, device=frequencies.device) / count * pretrain_side
    return torch.outer(steps, frequencies).repeat_interleave(2, dim=1)


class RotaryEmbedding2d(nn.Module):
    """Turns channel pairs of patch tokens by angles of their grid position.

    Args:
        dim: channels of a token.
        grid: rows and columns of patches.
        pretrain_side: see `rotary_tables`.
    """

    def __init__(self, dim: int, grid: tuple[int, int], pretrain_side: int) -> None:
        super().__init__()
        self.dim, self.pretrain_side = dim, pretrain_side
        cos, sin = rotary_tables(dim, grid, pretrain_side)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Rebuild the tables for another patch grid."""
        cos, sin = rotary_tables(self.dim, grid, self.pretrain_side, device=self.freqs_cos.device)
        self.freqs_cos, self.freqs_sin = cos.to(self.freqs_cos), sin.to(self.freqs_sin)


def rotate(patches: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, M, D) with tables (M, D) → (B, M, D): pairs (a, b) become (a cos - b sin, b cos + a sin)."""
    pairs = patches.unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((-b, a), dim=-1).flatten(-2)
    return patches * cos.to(patches.dtype) + turned * sin.to(patches.dtype)
