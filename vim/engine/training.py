"""One epoch of training, and evaluation."""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3, NativeScaler, accuracy
from torch import nn

from vim.data import seed_all
from vim.data.loaders import TrainLoader
from vim.engine.distributed import Place, sum_over_ranks
from vim.engine.losses import DistillationLoss
from vim.engine.reporting import Reporter
from vim.errors import UserError

# First key of the step's seed, apart from the seeds of samples, which begin with the run's seed alone.
_STEP_STREAM = 0x57E9


@dataclass
class TrainState:
    """All that changes while training.

    Attributes:
        model: the bare model; `forward` the same behind DistributedDataParallel.
        epoch, step: the next to run.
        best: best top-1 so far, percent.
        skipped: steps skipped for a loss that was not finite.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: ModelEmaV3 | None
    scaler: NativeScaler | None
    epoch: int = 0
    step: int = 0
    best: float = 0.0
    skipped: int = 0
    stop_requested: bool = field(default=False, compare=False)


def autocast(args: argparse.Namespace, place: Place) -> AbstractContextManager:
    """The precision of forward passes: `--if_amp` in `--amp-dtype`, else as the parameters are."""
    if not args.if_amp:
        return nullcontext()
    return torch.autocast(place.device.type, dtype=getattr(torch, args.amp_dtype))


def model_options(args: argparse.Namespace) -> dict[str, bool]:
    """Keyword arguments of VisionMamba.forward that flags turn on."""
    names = ("if_random_cls_token_position", "if_random_token_rank")
    return {name: True for name in names if getattr(args, name)}


def train_one_epoch(
    state: TrainState,
    loader: TrainLoader,
    loss_function: nn.Module,
    mixup: Mixup | None,
    args: argparse.Namespace,
    place: Place,
    reporter: Reporter,
) -> dict[str, float] | None:
    """Run the epoch `state.epoch` from `state.step` on.

    Returns:
        Mean loss, learning rate, images per second and seconds; None if a stop was requested before the end.

    Raises:
        UserError: the loss is not finite, unless `--if_continue_inf`.
    """
    state.forward.train(args.train_mode)
    loader.set_epoch(state.epoch)
    loader.set_start_step(state.step)
    reporter.start(f"epoch {state.epoch + 1}/{args.epochs}", len(loader), state.step)
    lr = state.optimizer.param_groups[0]["lr"]
    total, images_seen, begun = torch.zeros(2, dtype=torch.float64), 0, time.perf_counter()
    for images, targets in loader:
        if state.stop_requested:
            reporter.finish()
            return None
        # Mixup, dropout and stochastic depth draw from these, so a resumed step is the same step.
        seed_all(args.seed, _STEP_STREAM, state.epoch, state.step, place.rank)
        images, targets = images.to(place.device, non_blocking=True), targets.to(place.device, non_blocking=True)
        loss = _loss(state, loss_function, mixup, images, targets, args, place)
        value = loss.item()
        if math.isfinite(value):
            _update(state, loss, args)
            total += torch.tensor([value, 1.0], dtype=torch.float64)
        else:
            _not_finite(state, value, args)
        state.step += 1
        images_seen += len(images) * place.world_size
        reporter.step(loss=value, images=len(images) * place.world_size, lr=lr)
    reporter.finish()
    state.epoch, state.step = state.epoch + 1, 0
    total = sum_over_ranks(total, place)
    seconds = time.perf_counter() - begun
    return {
        "train_loss": (total[0] / total[1].clamp(min=1)).item(),
        "train_lr": lr,
        "train_images_per_s": images_seen / seconds,
        "train_s": seconds,
        "skipped_steps": state.skipped,
    }


def _loss(
    state: TrainState,
    loss_function: nn.Module,
    mixup: Mixup | None,
    images: torch.Tensor,
    targets: torch.Tensor,
    args: argparse.Namespace,
    place: Place,
) -> torch.Tensor:
    if mixup is not None:
        images, targets = mixup(images, targets)
    if args.bce_loss:
        if targets.dim() == 1:
            targets = F.one_hot(targets, state.model.num_classes)
        targets = targets.gt(0.0).float()
    with autocast(args, place):
        logits = state.forward(images, **model_options(args))
        if args.if_nan2num:
            logits = torch.nan_to_num(logits)
        if isinstance(loss_function, DistillationLoss):
            return loss_function(images, logits, targets)
        return loss_function(logits, targets)


def _update(state: TrainState, loss: torch.Tensor, args: argparse.Namespace) -> None:
    state.optimizer.zero_grad()
    if state.scaler is not None:
        state.scaler(loss, state.optimizer, clip_grad=args.clip_grad, parameters=state.model.parameters())
    else:
        loss.backward()
        if args.clip_grad is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), args.clip_grad)
        state.optimizer.step()
    if state.ema is not None:
        state.ema.update(state.model)


def _not_finite(state: TrainState, value: float, args: argparse.Namespace) -> None:
    if not args.if_continue_inf:
        raise UserError(
            f"the loss is {value} in epoch {state.epoch}, step {state.step}: lower --lr, use --amp-dtype bfloat16 or "
            "--no_amp, or skip such steps with --if_continue_inf; the last checkpoint is as it was"
        )
    state.skipped += 1


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    args: argparse.Namespace,
    place: Place,
    reporter: Reporter,
    keep: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> dict[str, float]:
    """Loss (cross-entropy), top-1 and top-5 in percent over the whole set, each sample counted once.

    Args:
        model: classifier.
        loader: this process's share of the set.
        args, place, reporter: of the run.
        keep: receives logits (B, K) and targets (B,) of each batch.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    reporter.start("evaluate", len(loader))
    begun = time.perf_counter()
    for images, targets in loader:
        images, targets = images.to(place.device, non_blocking=True), targets.to(place.device, non_blocking=True)
        with autocast(args, place):
            logits = model(images, **model_options(args))
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        top1, top5 = accuracy(logits, targets, topk=(1, min(5, logits.shape[1])))
        count = len(targets)
        batch = [loss.item(), top1.item() * count, top5.item() * count, count]
        sums += torch.tensor(batch, dtype=torch.float64)
        reporter.step(loss=loss.item() / count, images=count * place.world_size)
        if keep is not None:
            keep(logits, targets)
    reporter.finish()
    sums = sum_over_ranks(sums, place).cpu()
    loss, top1, top5 = (sums[:3] / sums[3].clamp(min=1)).tolist()
    seconds = time.perf_counter() - begun
    return {"test_loss": loss, "test_acc1": top1, "test_acc5": top5, "test_images_per_s": sums[3].item() / seconds}
