"""One epoch of training."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.distributed.tensor import DTensor

from vim.data import seed_all
from vim.data.loaders import TrainLoader
from vim.engine.checkpoints import CheckpointManager
from vim.engine.distributed import DistributedContext, sum_over_ranks, without_gradient_exchange
from vim.engine.graphs import GraphedBackward, why_not
from vim.engine.losses import TrainingLoss
from vim.engine.reporting import Reporter, memory_mib
from vim.engine.state import TrainState
from vim.errors import UserError
from vim.flags import Flags, Model, Optimisation
from vim.models import VisionMamba

_logger = logging.getLogger("vision_mamba")

# Images, targets, and over how many batches the loss is averaged → the loss, already part of that average.
Backward = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]

# First key of the step's seed, apart from the seeds of samples, which begin with the run's seed alone.
_STEP_STREAM = 0x57E9
NOT_FINITE = "nonfinite.pth"


def autocast(args: Optimisation, context: DistributedContext) -> AbstractContextManager:
    """Context of forward passes: autocast to `--amp-dtype` with `--if_amp`, else the dtype of the parameters."""
    if not args.if_amp:
        return nullcontext()
    return torch.autocast(context.device.type, dtype=getattr(torch, args.amp_dtype))


def model_options(args: Model, model: nn.Module) -> dict[str, bool]:
    """Arguments of VisionMamba.forward that flags turn on.

    Raises:
        UserError: the model is another one, which does not take them.
    """
    names = [n for n in ("if_random_cls_token_position", "if_random_token_rank") if getattr(args, n)]
    if names and not isinstance(model, VisionMamba):
        raise UserError(f"--{names[0]} is for Vision Mamba models, {args.model} is none: leave it out")
    return dict.fromkeys(names, True)


def build_backward(state: TrainState, criterion: TrainingLoss, args: Flags, context: DistributedContext) -> Backward:
    """The function that adds a batch's gradients, from a CUDA graph with `--cuda-graphs` where that is possible."""
    options = model_options(args, state.model)

    def eager(images: torch.Tensor, targets: torch.Tensor, parts: int) -> torch.Tensor:
        with autocast(args, context):
            loss = criterion.loss(lambda x: state.forward(x, **options), images, targets) / parts
        (loss if state.scaler is None else state.scaler.scale(loss)).backward()
        return loss.detach()

    backward: Backward = eager
    if args.cuda_graphs:
        if (reason := why_not(args, context)) is None:
            backward = GraphedBackward(eager, list(state.model.parameters()), parts=args.grad_accum_steps)
        else:
            _logger.info("--cuda-graphs: steps run eagerly, because %s", reason)
    return lambda images, targets, parts: backward(*criterion.prepare(images, targets), parts)


def train_one_epoch(
    state: TrainState,
    loader: TrainLoader,
    backward: Backward,
    args: Flags,
    context: DistributedContext,
    reporter: Reporter,
    manager: CheckpointManager,
) -> dict[str, float] | None:
    """Run the epoch `state.epoch` from `state.step` on.

    Returns:
        Mean loss and gradient norm of its updates, learning rate, images per second, seconds, of them seconds spent
        waiting for data and for the device, and the largest memory in MiB; None if a stop was requested before the end.

    Raises:
        UserError: a loss or gradient is not finite, unless `--if_continue_inf`.
    """
    state.forward.train(args.train_mode)
    steps, images_seen, data_wait, device_wait, begun = len(loader), 0, 0.0, 0.0, time.perf_counter()
    loader.set_epoch(state.epoch)
    loader.set_start_step(state.step)
    # An epoch that was stopped between its last step and its evaluation has no steps left.
    batches = iter(loader) if state.step < steps else iter(())
    reporter.start(f"epoch {state.epoch + 1}/{args.epochs}", steps, state.step)
    lr = max(group["lr"] for group in state.optimizer.param_groups)
    while state.step < steps:
        group = min(args.grad_accum_steps, steps - state.step)
        loss, for_data = _accumulate(state, batches, group, backward, args, context, reporter)
        norm = _clip(state, args)
        # The host learns the loss when the device has come this far.
        tick = time.perf_counter()
        loss, norm, stop, save = _agree(loss, norm, state.stop_requested, manager.due(group), context)
        for_device = time.perf_counter() - tick
        data_wait, device_wait = data_wait + for_data, device_wait + for_device
        if math.isfinite(loss) and math.isfinite(norm):
            _update(state)
            state.loss_sum, state.norm_sum = state.loss_sum + loss, state.norm_sum + norm
            state.updates += 1
        elif args.if_continue_inf or (math.isfinite(loss) and _scaler_goes_on(state)):
            state.skipped += 1
            if state.scaler is not None:
                state.scaler.update()
        else:
            _stop_not_finite(state, loss, norm, group, loader, context, manager)
        images = group * args.batch_size * context.world_size
        images_seen += images
        state.step += group
        reporter.step(
            loss=loss, images=images, steps=group, data_wait=for_data, device_wait=for_device,
            at=state.epoch * steps + state.step,
            train={"lr": lr, "grad_norm": norm, "memory_mib": memory_mib(context.device)},
        )  # fmt: skip
        if stop:
            reporter.finish()
            return None
        if save:
            manager.save(state)
    reporter.finish()
    reporter.histograms(state.model, state.epoch)
    seconds = time.perf_counter() - begun
    return {
        "train_loss": state.loss_sum / max(state.updates, 1),
        "train_grad_norm": state.norm_sum / max(state.updates, 1),
        "train_lr": lr,
        "train_images_per_s": images_seen / seconds,
        "train_s": seconds,
        "train_data_wait_s": data_wait,
        "train_device_wait_s": device_wait,
        "train_memory_mib": memory_mib(context.device),
        "skipped_updates": state.skipped,
    }


def _accumulate(
    state: TrainState,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    group: int,
    backward: Backward,
    args: Flags,
    context: DistributedContext,
    reporter: Reporter,
) -> tuple[torch.Tensor, float]:
    """Gradients of the mean loss of the next `group` batches; returns the loss and seconds of waiting for data."""
    state.optimizer.zero_grad()
    total, waited = torch.zeros((), dtype=torch.float32, device=context.device), 0.0
    for k in range(group):
        tick = time.perf_counter()
        images, targets = next(batches)
        waited += time.perf_counter() - tick
        reporter.samples(images)
        # Mixup, dropout and stochastic depth draw from these, so a resumed step is the same step.
        seed_all(args.seed, _STEP_STREAM, state.epoch, state.step + k, context.rank)
        images, targets = images.to(context.device, non_blocking=True), targets.to(context.device, non_blocking=True)
        with nullcontext() if k == group - 1 else without_gradient_exchange(state.forward):
            total += backward(images, targets, group)
    return total, waited


def _clip(state: TrainState, args: Optimisation) -> torch.Tensor:
    """Clip the gradients as `--clip-grad` says; returns their norm before clipping."""
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if args.clip_grad is not None:
        if args.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, norm)
        else:
            dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _agree(
    loss: torch.Tensor, norm: torch.Tensor, stop: bool, save: bool, context: DistributedContext
) -> tuple[float, float, bool, bool]:
    """What all processes agree on: the mean loss, the norm, and whether any of them must stop or save."""
    local = torch.tensor([float(stop), float(save)], dtype=torch.float64)
    both = torch.stack((loss.double(), norm.detach().double()))
    shared = sum_over_ranks(torch.cat((both, local.to(both.device))), context) if context.world_size > 1 else None
    loss_value, norm_value, stops, saves = (torch.cat((both.cpu(), local)) if shared is None else shared).tolist()
    return loss_value / context.world_size, norm_value / context.world_size, stops > 0, saves > 0


def _update(state: TrainState) -> None:
    if state.scaler is not None:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.step()
    if state.ema is not None:
        state.ema.update(state.model)


def _scaler_goes_on(state: TrainState) -> bool:
    """Whether the loss scale caused the overflow: it finds its value by overflowing."""
    return state.scaler is not None and state.scaler.get_scale() > 1.0


def _stop_not_finite(
    state: TrainState,
    loss: float,
    norm: float,
    group: int,
    loader: TrainLoader,
    context: DistributedContext,
    manager: CheckpointManager,
) -> None:
    """Save what reproduces the update, and stop."""
    indices: Any = [loader.batch_indices(state.step + k) for k in range(group)]
    if context.world_size > 1:
        gathered: list[Any] = [None] * context.world_size
        torch.distributed.all_gather_object(gathered, indices)
        indices = gathered
    else:
        indices = [indices]
    path = manager.save(state, NOT_FINITE, nonfinite={"loss": loss, "grad_norm": norm, "indices_rank_step": indices})
    kept = (
        f"the state before it and the data-set indices of its images are in {path}: --resume {path} runs into it again"
        if path is not None
        else "pass --output-dir to have the state before it kept"
    )
    raise UserError(
        f"the loss is {loss} and the gradient norm {norm} in epoch {state.epoch}, step {state.step}; {kept}; lower "
        "--lr, use --amp-dtype bfloat16 or --no_amp, or skip such steps with --if_continue_inf"
    )
