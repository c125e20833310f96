"""The pictures of `python -m vim.analysis`: each function writes one PNG of what it is given."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _show(axis: plt.Axes, image: np.ndarray, title: str = "", **options) -> None:
    axis.imshow(image, **({"cmap": "gray", "vmin": 0, "vmax": 1} | options))
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])


def draw_fields(fields: dict[str, torch.Tensor], sides: dict[str, str], path: Path) -> None:
    """Receptive fields (H, W) side by side, on a logarithmic scale of each one's largest value.

    Args:
        fields: by the title.
        sides: a line below each, by the title.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, len(fields), figsize=(3.4 * len(fields), 3.9), squeeze=False, layout="constrained")
    for axis, (title, field) in zip(axes[0], fields.items(), strict=True):
        scaled = (field / field.max()).clamp(min=1e-4).log10().cpu().numpy()
        picture = axis.imshow(scaled, cmap="viridis", vmin=-4, vmax=0)
        axis.set(title=title, xticks=[], yticks=[], xlabel=sides[title])
    figure.colorbar(picture, ax=axes[0].tolist(), label="log10 of the gradient over its largest", shrink=0.8)
    _save(figure, path)


def draw_attention(
    image: np.ndarray, matrices: Sequence[torch.Tensor], grid: tuple[int, int], positions: list[int], path: Path
) -> None:
    """The matrices of a block, and over the picture what the class token (or the middle patch) reads through each.

    Args:
        image: (H, W) or (H, W, 3) in [0, 1].
        matrices: (L, L) of each scan.
        grid: rows and columns of the patches.
        positions: of the class tokens in the sequence.
        path: PNG to write.
    """
    patches = grid[0] * grid[1]
    row = positions[0] if positions else patches // 2
    figure, axes = plt.subplots(2, len(matrices) + 1, figsize=(3.3 * (len(matrices) + 1), 6.6), layout="constrained")
    _show(axes[0, 0], image, "picture")
    reader = "class token" if positions else "middle patch"
    both = torch.stack(list(matrices)).sum(0)
    for column, (title, matrix) in enumerate(
        zip(["forward scan", "backward scan", "third scan"][: len(matrices)], matrices, strict=True), start=1
    ):
        shown = (matrix / matrix.max()).clamp(min=1e-4).log10().cpu().numpy()
        _show(axes[0, column], shown, f"{title}: token reads token", cmap="magma", vmin=-4, vmax=0)
    for column, matrix in enumerate([both, *matrices]):
        weights = np.delete(matrix[row].cpu().numpy(), positions)[:patches].reshape(grid)
        extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        _show(axes[1, column], image)
        largest = weights.max() or 1.0
        _show(axes[1, column], weights, "", cmap="inferno", vmin=0, vmax=largest, alpha=0.6, extent=extent)
        axes[1, column].set_title(f"read by the {reader}" + (", all scans" if column == 0 else ""), fontsize=9)
    _save(figure, path)


def draw_attribution(
    images: Sequence[np.ndarray], titles: list[str], maps: dict[str, torch.Tensor], path: Path
) -> None:
    """A row per image: the picture, and each kind of attribution (n, H, W) over it; signed maps in red and blue."""
    rows, columns = len(images), 1 + len(maps)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.8 * rows), squeeze=False, layout="constrained")
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        _show(axes[row, 0], image, title)
        for column, (name, values) in enumerate(maps.items(), start=1):
            heat = values[row].cpu().numpy()
            largest = float(np.quantile(np.abs(heat), 0.99)) or 1.0
            signed = heat.min() < 0
            _show(axes[row, column], image, name if row == 0 else "")
            colours = {"cmap": "seismic", "vmin": -largest} if signed else {"cmap": "inferno", "vmin": 0}
            _show(axes[row, column], heat, name if row == 0 else "", alpha=0.7, vmax=largest, **colours)
    _save(figure, path)


def draw_components(images: Sequence[np.ndarray], maps: dict[str, torch.Tensor], path: Path) -> None:
    """A column per image: the picture, and below it its components (n, rows, columns, 3) of each layer."""
    rows, columns = 1 + len(maps), len(images)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.8 * rows), squeeze=False, layout="constrained")
    for column, image in enumerate(images):
        _show(axes[0, column], image)
        for row, (name, colours) in enumerate(maps.items(), start=1):
            _show(axes[row, column], colours[column].cpu().numpy())
            if column == 0:
                axes[row, 0].set_ylabel(name)
    _save(figure, path)


def draw_decay(lengths: Sequence[Sequence[torch.Tensor]], tokens: int, path: Path) -> None:
    """The quartiles and the range of 5 to 95 % of the decay lengths (E, N) of each block and scan, in tokens."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    count = max(len(scans) for scans in lengths)
    for k, name in zip(range(count), ("forward", "backward", "third"), strict=False):
        quantiles = np.array([np.quantile(s[k].cpu().numpy(), [0.05, 0.25, 0.5, 0.75, 0.95]) for s in lengths])
        blocks = np.arange(len(lengths))
        axis.plot(blocks, quantiles[:, 2], f"C{k}-o", label=f"{name} scan, median")
        axis.fill_between(blocks, quantiles[:, 1], quantiles[:, 3], color=f"C{k}", alpha=0.3)
        axis.fill_between(blocks, quantiles[:, 0], quantiles[:, 4], color=f"C{k}", alpha=0.1)
    axis.axhline(tokens, color="0.4", ls="--", lw=0.8, label=f"the whole sequence, {tokens} tokens")
    axis.set(xlabel="block", ylabel="tokens until exp(-1) is left", yscale="log", title="Memory of the states")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    _save(figure, path)


def draw_positions(positions: list[int], accuracies: list[float], own: int, images: int, path: Path) -> None:
    """Top-1 against the place of the class token, its own place marked."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(positions, accuracies, marker="o")
    axis.axvline(own, color="0.4", ls="--", lw=0.8, label=f"trained at {own}")
    axis.set(xlabel="place of the class token", ylabel=f"top-1 (%) of {images} test images")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, path)
