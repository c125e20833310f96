"""Mixers that follow the patch grid: pooled scans (FastVim) and scans along rows and columns (ARM).

Legend: B batch, L tokens, D model width, E inner channels, N states, R rank of dt, W convolution width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from mamba_ssm_vim import Mamba
from mamba_ssm_vim.ops.mixer import mixer
from mamba_ssm_vim.ops.mixer.reference import convolve, fields_of, mix_direction, scan, select, transition
from timm.models import register_notrace_module
from torch import nn

from vim.models.layout import TokenLayout, join_tokens, split_tokens


class GridMixer(Mamba):
    """A mixer whose forward takes the layout of the sequence beside the tokens."""


def transpose_grid(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, rows * columns, D) in row order → the same tokens in column order."""
    return patches.unflatten(1, [grid[0], grid[1]]).transpose(1, 2).flatten(1, 2)


def pool_groups(tokens: torch.Tensor, group: int, pool: str) -> torch.Tensor:
    """(B, L, E) → (B, L / group, E): the mean, or the maximum, of each `group` consecutive tokens."""
    grouped = tokens.unflatten(1, [tokens.shape[1] // group, group])
    return grouped.mean(2) if pool == "mean" else grouped.amax(2)


def scan_direction(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    reverse: bool,
    group: int,
    pool: str,
    pool_scale: float,
) -> torch.Tensor:
    """One direction of the mixer without its gate, scanning pooled tokens (arXiv 2502.00594, section 3).

    Args:
        x: (B, L, E).
        conv_weight, ..., reverse: the fields of `Direction`.
        group: consecutive tokens that are pooled into one; 1 scans every token.
        pool: "mean" or "max".
        pool_scale: factor of a mean.

    Returns:
        (B, L, E) in x's dtype: the scan's output, repeated for each token of its group, and D times the token.
    """
    u = convolve(x, conv_weight, conv_bias, reverse)
    pooled = u
    if group > 1:
        pooled = pool_groups(u, group, pool)
        if pool == "mean" and pool_scale != 1.0:
            pooled = pooled * pool_scale
    delta, B, C = select(pooled, x_proj_weight, dt_proj_weight, A)
    scanned = scan(pooled, delta, A, B, C, D if group == 1 else None, None, dt_bias, True, reverse)
    if group == 1:
        return scanned
    repeated = scanned.unsqueeze(2).expand(-1, -1, group, -1).flatten(1, 2)
    return (repeated + D * u).to(x.dtype)


@register_notrace_module
class PooledMamba(GridMixer):
    """Vim's mixer "v2" with LayerNorm between scan and gate, and pooling before the scan (FastVim, arXiv 2502.00594).

    The two directions are averaged, normalised and gated once. With pooling, each direction scans one token per row:
    the mean or maximum over the columns; blocks of odd index work on the transposed grid if `alternate`.

    Args:
        d_model: width D.
        norm: LayerNorm over the inner channels before the gate.
        pool: "mean", "max", or "none" to scan every token.
        pool_scale: factor of the means; below 1 for a model pretrained on masked images.
        alternate: pool over rows in blocks of odd index.
        layer_idx, others: see `Mamba`.

    Raises:
        ValueError: an unknown `pool`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        norm: bool,
        pool: str,
        pool_scale: float,
        alternate: bool,
        layer_idx: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, layer_idx=layer_idx, bimamba_type="v2", if_divide_out=True, **kwargs)
        if pool not in ("none", "mean", "max"):
            raise ValueError(f"scan_pool is {pool!r}, expected 'none', 'mean' or 'max'")
        self.pool, self.pool_scale, self.transposed = pool, float(pool_scale), alternate and layer_idx % 2 == 1
        weight = self.in_proj.weight
        factory = {"device": weight.device, "dtype": weight.dtype}
        self.layernorm = nn.LayerNorm(self.d_inner, eps=1e-5, **factory) if norm else nn.Identity()

    def forward(self, hidden: torch.Tensor, layout: TokenLayout | None) -> torch.Tensor:
        """(B, L, D) → (B, L, D)."""
        assert layout is not None, "this mixer needs the layout of the tokens"
        rows, columns = layout.grid
        pooled, transposed = self.pool != "none", self.pool != "none" and self.transposed
        if transposed:
            hidden = transpose_grid(hidden, (rows, columns))
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        group = (rows if transposed else columns) if pooled else 1
        if torch.jit.is_scripting():
            forward = scan_direction(
                x, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.dt_proj.bias, transition(self.A_log), self.D, False, group, self.pool, self.pool_scale,
            )  # fmt: skip
            backward = scan_direction(
                x, self.conv1d_b.weight.squeeze(1), self.conv1d_b.bias, self.x_proj_b.weight, self.dt_proj_b.weight,
                self.dt_proj_b.bias, transition(self.A_b_log), self.D_b, True, group, self.pool, self.pool_scale,
            )  # fmt: skip
        else:
            forward, backward = (
                scan_direction(x, *fields_of(direction), group, self.pool, self.pool_scale)
                for direction in self.directions()
            )
        out = self.layernorm((forward + backward) * 0.5).to(z.dtype) * F.silu(z)
        out = self.out_proj(out)
        if transposed:
            out = transpose_grid(out, (columns, rows))
        return out * self.gamma if hasattr(self, "gamma") else out


@register_notrace_module
class CrossMamba(GridMixer):
    """Four scans with own parameters: along the rows and along the columns, each in both directions ("v3" of ARM).

    The outputs are averaged. in_proj and out_proj are shared. Parameters of the column scans end in `_c` and `_c_b`.

    In column order the token at index (M + 1) // 2 keeps its place. That is the class token in the middle if the number
    M of patches is even; for odd M the published code leaves the patch behind it in place, and so does this.

    Args:
        d_model: width D.
        others: see `Mamba`.
    """

    def __init__(self, d_model: int, *, conv_bias: bool = True, **kwargs: Any) -> None:
        super().__init__(d_model, bimamba_type="v2", conv_bias=conv_bias, **kwargs)
        weight = self.in_proj.weight
        self.bimamba_type = "v3"
        for suffix in ("_c", "_c_b"):
            self._add_direction(suffix, conv_bias, own_parameters=True, device=weight.device, dtype=weight.dtype)

    def forward(self, hidden: torch.Tensor, layout: TokenLayout | None) -> torch.Tensor:
        """(B, L, D) → (B, L, D)."""
        assert layout is not None, "this mixer needs the layout of the tokens"
        grid, patches = layout.grid, layout.grid[0] * layout.grid[1]
        kept: list[int] = []
        if len(layout.positions) == 1:
            kept.append((patches + 1) // 2)
        by_rows = TokenLayout(grid, 1, kept)
        by_columns = TokenLayout((grid[1], grid[0]), 1, kept)
        xz = self.in_proj(hidden)
        xz_columns = _other_order(xz, by_rows)
        if torch.jit.is_scripting():
            out = self._scripted_rows(xz) + _other_order(self._scripted_columns(xz_columns), by_columns)
        else:
            rows = mixer(xz, [self._direction(""), self._direction("_b")], scale=0.25)
            columns = mixer(xz_columns, [self._direction("_c"), self._direction("_c_b")], scale=0.25)
            out = rows + _other_order(columns, by_columns)
        out = self.out_proj(out)
        return out * self.gamma if hasattr(self, "gamma") else out

    def _scripted_rows(self, xz: torch.Tensor) -> torch.Tensor:
        x, z = xz.chunk(2, dim=-1)
        return 0.25 * (
            mix_direction(
                x, z, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.dt_proj.bias, transition(self.A_log), self.D, False,
            ) + mix_direction(
                x, z, self.conv1d_b.weight.squeeze(1), self.conv1d_b.bias, self.x_proj_b.weight, self.dt_proj_b.weight,
                self.dt_proj_b.bias, transition(self.A_b_log), self.D_b, True,
            )
        )  # fmt: skip

    def _scripted_columns(self, xz: torch.Tensor) -> torch.Tensor:
        x, z = xz.chunk(2, dim=-1)
        return 0.25 * (
            mix_direction(
                x, z, self.conv1d_c.weight.squeeze(1), self.conv1d_c.bias, self.x_proj_c.weight, self.dt_proj_c.weight,
                self.dt_proj_c.bias, transition(self.A_c_log), self.D_c, False,
            ) + mix_direction(
                x, z, self.conv1d_c_b.weight.squeeze(1), self.conv1d_c_b.bias, self.x_proj_c_b.weight,
                self.dt_proj_c_b.weight, self.dt_proj_c_b.bias, transition(self.A_c_b_log), self.D_c_b, True,
            )
        )  # fmt: skip


def _other_order(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The sequence with its patches in the order of the transposed grid; special tokens keep their places."""
    special, patches = split_tokens(tokens, layout)
    return join_tokens(special, transpose_grid(patches, layout.grid), layout)


def build_mixer(
    d_model: int,
    *,
    bimamba_type: str | None = "none",
    if_divide_out: bool = False,
    norm_after_ssm: bool = False,
    scan_pool: str = "none",
    scan_pool_scale: float = 1.0,
    scan_pool_alternate: bool = True,
    **kwargs: Any,
) -> Mamba:
    """The mixer that these options name; they are those of `VisionMamba`.

    Raises:
        ValueError: options that cannot be combined.
    """
    if norm_after_ssm or scan_pool != "none":
        if bimamba_type != "v2":
            raise ValueError(
                f"norm_after_ssm and scan_pool average two directions with own parameters: use bimamba_type='v2', "
                f"got {bimamba_type!r}"
            )
        if not if_divide_out:
            raise ValueError("norm_after_ssm and scan_pool average the directions: use if_divide_out=True")
        return PooledMamba(
            d_model, norm=norm_after_ssm, pool=scan_pool, pool_scale=scan_pool_scale, alternate=scan_pool_alternate,
            **kwargs,
        )  # fmt: skip
    if bimamba_type == "v3":
        return CrossMamba(d_model, **kwargs)
    return Mamba(d_model, bimamba_type=bimamba_type, if_divide_out=if_divide_out, **kwargs)
