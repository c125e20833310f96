"""Figures: learning curves, a panel of predictions, a confusion matrix. Each function writes one PNG."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vim.errors import UserError

_RIGHT, _WRONG = "#2b7a3d", "#b3261e"


def read_log(path: Path) -> list[dict[str, float]]:
    """The epochs of a run's `log.txt` (JSON lines), the last record of each epoch, in order.

    Raises:
        UserError: the file is missing, empty or not JSON lines.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as a run's log of JSON lines: {error}") from error
    if not records:
        raise UserError(f"{path} has no epoch yet: let the run finish one")
    return [record for _, record in sorted({r["epoch"]: r for r in records}.items())]


def plot_curves(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Loss and top-1 against epochs, a line per run: dashed for the training loss, dotted for averaged weights.

    Args:
        runs: epochs as `read_log` gives them, by the run's name.
        path: PNG to write.
    """
    figure, (loss_axis, accuracy_axis) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for k, (name, records) in enumerate(runs.items()):
        epochs = [r["epoch"] + 1 for r in records]
        label = f"{name}, " if len(runs) > 1 else ""
        loss_axis.plot(epochs, [r["train_loss"] for r in records], f"C{k}--", label=f"{label}training")
        loss_axis.plot(epochs, [r["test_loss"] for r in records], f"C{k}-", label=f"{label}test")
        best = max(r["test_acc1"] for r in records)
        accuracy_axis.plot(
            epochs, [r["test_acc1"] for r in records], f"C{k}-", marker=".", label=f"{label}{best:.2f} %"
        )
        if averaged := [(r["epoch"] + 1, r["ema_test_acc1"]) for r in records if "ema_test_acc1" in r]:
            best = max(accuracy for _, accuracy in averaged)
            accuracy_axis.plot(*zip(*averaged, strict=True), f"C{k}:", label=f"{label}averaged weights {best:.2f} %")
    loss_axis.set(xlabel="epoch", ylabel="loss", title="Loss")
    accuracy_axis.set(xlabel="epoch", ylabel="top-1 (%)", title="Test accuracy (best in the legend)")
    for axis in (loss_axis, accuracy_axis):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_predictions(
    images: np.ndarray,
    targets: Sequence[int],
    predictions: Sequence[int],
    confidences: Sequence[float],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Images with predicted and true label, green where they agree.

    Args:
        images: (n, H, W) or (n, H, W, 3), in [0, 1].
        targets, predictions: class numbers.
        confidences: probability of the prediction.
        classes: names.
        path: PNG to write.
    """
    columns = 8
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, target, predicted, confidence in zip(
        axes.flat, images, targets, predictions, confidences, strict=False
    ):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        right = target == predicted
        title = f"{classes[predicted]} {confidence:.0%}" + ("" if right else f"\nis: {classes[target]}")
        axis.set_title(title, fontsize=8, color=_RIGHT if right else _WRONG)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_classes(images: Sequence[np.ndarray], classes: Sequence[list[tuple[str, float]]], path: Path) -> None:
    """Images with the likeliest classes of each as bars below it.

    Args:
        images: images that matplotlib can show, such as PIL's.
        classes: pairs (name, probability) of each, likeliest first.
        path: PNG to write.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = plt.figure(figsize=(3.2 * columns, 4.6 * rows), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1.2] * rows)
    for k, (image, pairs) in enumerate(zip(images, classes, strict=True)):
        row, column = divmod(k, columns)
        shown, bars = figure.add_subplot(grid[2 * row, column]), figure.add_subplot(grid[2 * row + 1, column])
        shown.imshow(image, cmap="gray")
        shown.axis("off")
        shown.set_title(f"{pairs[0][0]} {pairs[0][1]:.0%}", fontsize=10)
        heights = range(len(pairs), 0, -1)
        bars.barh(heights, [probability for _, probability in pairs], color=[_RIGHT] + ["0.75"] * (len(pairs) - 1))
        for height, (name, probability) in zip(heights, pairs, strict=True):
            bars.text(0.02, height, f"{name} {probability:.1%}", va="center", fontsize=8)
        bars.set(xlim=(0, 1), xticks=[], yticks=[])
        bars.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_confusion(targets: np.ndarray, predictions: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Confusion matrix in percent of each true class.

    Args:
        targets, predictions: (n,) class numbers.
        classes: names.
        path: PNG to write.
    """
    count = len(classes)
    matrix = np.zeros((count, count))
    np.add.at(matrix, (targets, predictions), 1)
    percent = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(1.5 + 0.65 * count, 1 + 0.6 * count), layout="constrained")
    picture = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axis.set(xticks=range(count), yticks=range(count), xlabel="predicted", ylabel="true")
    axis.set_xticklabels(classes, rotation=45, ha="right")
    axis.set_yticklabels(classes)
    axis.set_title(f"top-1 {100 * np.mean(targets == predictions):.2f} % of {len(targets):,} test images")
    for i, j in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if percent[i, j] > 50 else "black"
        axis.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(picture, label="% of the true class", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
