"""Evaluation: exact over any number of processes, on all classes or on a subset of them, per class."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vim.data import LEFT_OUT, sample_shape
from vim.engine.distributed import DistributedContext, largest_over_ranks, sum_over_ranks
from vim.engine.reporting import Reporter
from vim.engine.training import autocast, model_options
from vim.errors import UserError
from vim.flags import Flags, Run

Keep = Callable[[torch.Tensor, torch.Tensor], None]


def _batches(
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]], args: Run, context: DistributedContext
) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
    """The loader's batches, without images that could not be read, as if they were not there.

    With shards, which all processes gather together, yields None while another process still has batches.
    """
    iterator = iter(loader)
    while True:
        batch = next(iterator, None)
        left = batch is not None
        if not (largest_over_ranks(int(left), context) if args.fsdp else left):
            return
        if batch is not None and not (good := batch[1] != LEFT_OUT).all():
            batch = (batch[0][good], batch[1][good]) if good.any() else None
        if batch is not None or args.fsdp:
            yield batch


def _hits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target (B,) has the largest logit of its row (B, K), and one of the five largest: (B,) bool each."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    return ranked[:, 0], ranked.any(1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    args: Flags,
    context: DistributedContext,
    reporter: Reporter,
    keep: Keep | None = None,
    *,
    columns: list[int] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss (cross-entropy), top-1 and top-5 in percent over the whole set, each sample counted once.

    Args:
        model: classifier.
        loader: this process's share of the set, batches of images (B, C, H, W) and class numbers (B,).
        args, context, reporter: of the run.
        keep: called with logits (B, K) and targets (B,) of each batch.
        columns: the model's output for each class of the set, where the set has a subset of the model's classes.
        stop_requested: asked between batches.

    Returns:
        The figures; None if a stop was requested in any process before the end.

    Raises:
        UserError: the set has no images.
    """
    model.eval()
    options = model_options(args, model)
    sums = torch.zeros(5, dtype=torch.float64)
    reporter.start("evaluate", len(loader))
    begun = time.perf_counter()
    for batch in _batches(loader, args, context):
        if batch is None:
            model(torch.zeros((1, *sample_shape(args)), dtype=torch.float32, device=context.device), **options)
            continue
        images, targets = batch
        # All processes gather shards together, so none may leave early.
        if stop_requested() and not args.fsdp:
            sums[4] = 1
            break
        images, targets = images.to(context.device, non_blocking=True), targets.to(context.device, non_blocking=True)
        with autocast(args, context):
            logits = model(images, **options)
        logits = logits.float() if columns is None else logits.float()[:, columns]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        top1, top5 = _hits(logits, targets)
        count = len(targets)
        # Hits are counted, not averaged, so that the figures do not depend on batches and processes.
        figures = torch.stack((loss.double(), top1.sum().double(), top5.sum().double())).cpu()
        sums[:3] += figures
        sums[3] += count
        reporter.step(loss=figures[0].item() / count, images=count * context.world_size)
        if keep is not None:
            keep(logits, targets)
    reporter.finish()
    sums = sum_over_ranks(sums, context).cpu()
    if sums[4] > 0:
        return None
    if sums[3] == 0:
        raise UserError("the evaluation set has no image that can be read: look at --data-path and --eval-split")
    loss, top1, top5 = (sums[:3] / sums[3].clamp(min=1)).tolist()
    seconds = time.perf_counter() - begun
    images = sums[3].item()
    return {
        "test_loss": loss, "test_acc1": 100 * top1, "test_acc5": 100 * top5, "test_images": int(images),
        "test_images_per_s": images / seconds,
    }  # fmt: skip


class PerClass:
    """Counts by class, to be passed to `evaluate` as `keep`.

    Args:
        classes: their names, in the order of their numbers.
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.counts = torch.zeros(len(classes), 3, dtype=torch.float64)  # images, top-1 hits, top-5 hits

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch: logits (B, K), targets (B,)."""
        top1, top5 = _hits(logits, targets)
        rows = torch.stack((torch.ones_like(top1), top1, top5), dim=1).cpu().double()
        self.counts.index_add_(0, targets.cpu(), rows)

    def write(self, path: Path, context: DistributedContext) -> None:
        """Sum over the processes and write a CSV file: class, images, top-1 and top-5 in percent.

        Raises:
            UserError: the file cannot be written.
        """
        counts = sum_over_ranks(self.counts, context).cpu()
        if not context.is_main:
            return
        try:
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("class", "images", "top1_percent", "top5_percent"))
                for name, (images, top1, top5) in zip(self.classes, counts.tolist(), strict=True):
                    share = 100 / images if images else float("nan")
                    writer.writerow((name, int(images), f"{top1 * share:.3f}", f"{top5 * share:.3f}"))
        except OSError as error:
            raise UserError(f"--per-class-csv {path} cannot be written: {error.strerror}") from error


def read_class_index(path: Path, classes: list[str], num_classes: int) -> list[int]:
    """The model's class number for each class folder of a subset such as ImageNet-R's.

    Args:
        path: lines of "folder number", or JSON: {"folder": number} or ImageNet's own {"number": ["folder", "name"]}.
        classes: folders of the set, in the order of their numbers there.
        num_classes: of the model.

    Raises:
        UserError: the file cannot be read, or lacks a folder.
    """
    try:
        text = path.read_text()
        if path.suffix == ".json":
            content = json.loads(text)
            entries = {(v[0] if isinstance(v, list) else k): int(k if isinstance(v, list) else v)
                       for k, v in content.items()}  # fmt: skip
        else:
            entries = {name: int(number) for name, number in (line.split() for line in text.splitlines() if line)}
    except (OSError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise UserError(
            f'--class-index {path} cannot be read, expected lines of "folder number" or a JSON mapping: {error}'
        ) from error
    if missing := [name for name in classes if name not in entries]:
        raise UserError(f"--class-index {path} lacks {len(missing)} of the set's folders, {missing[0]} among them")
    columns = [entries[name] for name in classes]
    if bad := [c for c in columns if not 0 <= c < num_classes]:
        raise UserError(f"--class-index {path} has class {bad[0]}, the model has classes 0 to {num_classes - 1}")
    return columns
