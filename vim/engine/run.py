"""From flags to a finished run: build data, model and optimizer, then train or evaluate."""

import argparse
import difflib
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import timm
import torch.distributed as dist
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vim.data import build_datasets, build_loaders, seed_all
from vim.engine import checkpoints
from vim.engine.arguments import parse_args, save_config
from vim.engine.distributed import Place, choose_place
from vim.engine.losses import DistillationLoss, base_loss
from vim.engine.reporting import Reporter
from vim.engine.training import TrainState, evaluate, train_one_epoch
from vim.errors import UserError
from vim.models import CheckpointError, extract_state_dict, load_checkpoint, load_into

_logger = logging.getLogger("vision_mamba")

# What a checkpoint's own flags do not decide: they belong to the machine and the command at hand.
_NOT_FROM_CHECKPOINT = (
    "config", "resume", "eval", "finetune", "output_dir", "device", "num_workers", "start_epoch", "local_rank"
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Entry point of `main.py`: 0, or 2 after a user's error, said in one sentence."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # timm and PIL speak at this level about matters of their own.
    logging.getLogger("timm").setLevel(logging.WARNING)
    # Which backend declined is worth a line only where the slow reference serves instead.
    logging.getLogger("vision_mamba.backend").setLevel(logging.WARNING)
    try:
        run(argv)
    except UserError as error:
        # A loader's worker passes its error on with its traceback before it.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def run(argv: list[str] | None = None) -> dict[str, float]:
    """Train or evaluate as the flags say; gives the last figures.

    Raises:
        UserError: see `parse_args`, `build_datasets`, `build_model`, and the checkpoint's and output folder's errors.
    """
    args = parse_args(argv)
    checkpoint = checkpoints.read(args.resume, args.output_dir) if args.resume else None
    own = checkpoint is not None and checkpoints.is_own(checkpoint)
    if own:
        defaults = {k: v for k, v in checkpoint["args"].items() if k not in _NOT_FROM_CHECKPOINT}
        args = parse_args(argv, defaults)
    place = choose_place(args)
    seed_all(args.seed)
    train_set, eval_set, num_classes = build_datasets(args)
    model = build_model(args, num_classes)
    if args.finetune:
        _load(model, load_checkpoint_for_user(args.finetune), reset_head=not args.eval)
    elif checkpoint is not None:
        _load(model, checkpoint, reset_head=False)
    model.to(place.device)
    train_loader, eval_loader = build_loaders(args, train_set, eval_set, world_size=place.world_size, rank=place.rank)
    if args.eval:
        return _evaluate_only(model, checkpoint, eval_loader, args, place)
    state, loss_function, mixup = build_training(model, args, place, num_classes)
    if own:
        _restore(state, checkpoint)
    elif checkpoint is not None:
        _logger.warning("the checkpoint holds no run of this project: its weights are loaded, the run starts afresh")
    output_dir = _output_dir(args, place)
    reporter = Reporter(output_dir, enabled=place.is_main, print_every_steps=args.print_every_steps)
    try:
        return _train(state, train_loader, eval_loader, loss_function, mixup, args, place, output_dir, reporter)
    finally:
        reporter.close()


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model that `--model` names.

    Raises:
        UserError: timm does not know it, or it cannot have that image size.
    """
    if not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, timm.list_models(), n=3) or timm.list_models("vim_*")
        raise UserError(f"there is no model {args.model!r}: did you mean {', '.join(close)}?")
    size = {"img_size": args.input_size} if args.model.startswith("vim_") else {}
    try:
        return timm.create_model(
            args.model,
            num_classes=num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            in_chans=args.in_chans,
            **size,
        )
    except ValueError as error:
        raise UserError(f"{args.model} cannot be built with --input-size {args.input_size}: {error}") from error


def load_checkpoint_for_user(path: str) -> dict[str, Any]:
    """`load_checkpoint` with its errors as the user's."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def _load(model: nn.Module, checkpoint: dict[str, Any], *, reset_head: bool) -> None:
    try:
        load_into(model, extract_state_dict(checkpoint), reset_head=reset_head)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def build_training(
    model: nn.Module, args: argparse.Namespace, place: Place, num_classes: int
) -> tuple[TrainState, nn.Module, Mixup | None]:
    """Optimizer, schedule, average, scaler, loss and mixing as the flags say."""
    lr_factor = 1.0 if args.unscale_lr else args.batch_size * place.world_size / 512
    lr = args.lr * lr_factor
    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=lr, weight_decay=args.weight_decay, momentum=args.momentum,
        eps=args.opt_eps, **({"betas": tuple(args.opt_betas)} if args.opt_betas else {}),
    )  # fmt: skip
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate, cooldown_epochs=args.cooldown_epochs, patience_epochs=args.patience_epochs,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs, warmup_prefix=False,
        noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std, noise_seed=args.seed,
    )  # fmt: skip
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    forward = model
    if place.world_size > 1:
        forward = DistributedDataParallel(model, device_ids=[place.device] if place.device.type == "cuda" else None)
    mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixed and args.batch_size % 2:
        raise UserError(f"mixup and cutmix pair the images of a batch: --batch-size must be even, is {args.batch_size}")
    mixup = None
    if mixed:
        mixup = Mixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
            num_classes=num_classes,
        )  # fmt: skip
    loss_function = base_loss(args, mixed=mixed)
    if args.distillation_type != "none":
        teacher = _teacher(args, num_classes).to(place.device)
        loss_function = DistillationLoss(
            loss_function, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau
        )
    scaler = NativeScaler(place.device.type) if args.if_amp and args.amp_dtype == "float16" else None
    state = TrainState(model, forward, optimizer, scheduler, ema, scaler, epoch=args.start_epoch)
    return state, loss_function, mixup


def _teacher(args: argparse.Namespace, num_classes: int) -> nn.Module:
    if not args.teacher_path:
        raise UserError(f"--distillation-type {args.distillation_type} needs --teacher-path, the teacher's checkpoint")
    if not timm.is_model(args.teacher_model):
        raise UserError(f"there is no model {args.teacher_model!r} to distil from: see timm.list_models()")
    teacher = timm.create_model(args.teacher_model, num_classes=num_classes, in_chans=args.in_chans)
    _load(teacher, load_checkpoint_for_user(args.teacher_path), reset_head=False)
    return teacher


def _output_dir(args: argparse.Namespace, place: Place) -> Path | None:
    if not args.output_dir:
        if place.is_main:
            _logger.warning("no --output-dir: nothing of this run will be kept")
        return None
    path = Path(args.output_dir)
    if place.is_main:
        try:
            path.mkdir(parents=True, exist_ok=True)
            save_config(args, path / "config.yaml")
        except OSError as error:
            raise UserError(f"--output-dir {path} cannot be written: {error.strerror}") from error
    return path


def _restore(state: TrainState, checkpoint: dict[str, Any]) -> None:
    try:
        state.optimizer.load_state_dict(checkpoint["optimizer"])
        state.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        if state.scaler is not None and checkpoint["scaler"] is not None:
            state.scaler.load_state_dict(checkpoint["scaler"])
        if state.ema is not None and checkpoint["model_ema"] is not None:
            state.ema.module.load_state_dict(checkpoint["model_ema"])
        state.epoch, state.step = checkpoint["epoch"], checkpoint["step"]
        state.best, state.skipped = checkpoint["best"], checkpoint["skipped"]
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's training state does not fit this run: {error}") from error


def _save(state: TrainState, args: argparse.Namespace, path: Path) -> None:
    checkpoints.save_atomically(
        {
            "model": state.model.state_dict(),
            "model_ema": None if state.ema is None else state.ema.module.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "lr_scheduler": state.scheduler.state_dict(),
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
            "epoch": state.epoch,
            "step": state.step,
            "best": state.best,
            "skipped": state.skipped,
            "args": vars(args),
        },
        path,
    )


def _train(
    state: TrainState,
    train_loader: Any,
    eval_loader: Any,
    loss_function: nn.Module,
    mixup: Mixup | None,
    args: argparse.Namespace,
    place: Place,
    output_dir: Path | None,
    reporter: Reporter,
) -> dict[str, float]:
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda *_: setattr(state, "stop_requested", True))
    record: dict[str, Any] = {}
    while state.epoch < args.epochs:
        epoch = state.epoch
        trained = train_one_epoch(state, train_loader, loss_function, mixup, args, place, reporter)
        if trained is None:
            if output_dir is not None and place.is_main:
                _save(state, args, output_dir / "checkpoint.pth")
                _logger.info("stopped by a signal in epoch %d, step %d: continue with --resume auto", epoch, state.step)
            return record
        # Published order: the schedule moves by the index of the epoch just finished.
        state.scheduler.step(epoch)
        tested = evaluate(state.model, eval_loader, args, place, reporter)
        if state.ema is not None:
            averaged = evaluate(state.ema.module, eval_loader, args, place, reporter)
            tested |= {f"ema_{k}": v for k, v in averaged.items()}
        improved = tested["test_acc1"] > state.best
        state.best = max(state.best, tested["test_acc1"])
        record = {"epoch": epoch, **trained, **tested, "best_acc1": state.best}
        if place.is_main:
            if output_dir is not None:
                _save(state, args, output_dir / "checkpoint.pth")
                if improved:
                    _save(state, args, output_dir / "best_checkpoint.pth")
                if args.keep_every_epochs and (epoch + 1) % args.keep_every_epochs == 0:
                    _save(state, args, output_dir / f"checkpoint_{epoch + 1:04d}.pth")
            _logger.info(
                "epoch %d/%d  loss %.4f  test loss %.4f  top-1 %.2f %%  top-5 %.2f %%  best %.2f %%  %.0f images/s",
                epoch + 1, args.epochs, record["train_loss"], record["test_loss"], record["test_acc1"],
                record["test_acc5"], state.best, record["train_images_per_s"],
            )  # fmt: skip
        reporter.epoch(record)
    return record


def _evaluate_only(
    model: nn.Module, checkpoint: dict[str, Any] | None, eval_loader: Any, args: argparse.Namespace, place: Place
) -> dict[str, float]:
    reporter = Reporter(None, enabled=place.is_main, print_every_steps=args.print_every_steps)
    record = evaluate(model, eval_loader, args, place, reporter)
    if checkpoint is not None and isinstance(checkpoint.get("model_ema"), dict):
        _load(model, {"model": extract_state_dict(checkpoint, use_ema=True)}, reset_head=False)
        averaged = evaluate(model, eval_loader, args, place, reporter)
        record |= {f"ema_{k}": v for k, v in averaged.items()}
    if place.is_main:
        print(
            f"{len(eval_loader.dataset)} test images: top-1 {record['test_acc1']:.3f} %  "
            f"top-5 {record['test_acc5']:.3f} %  loss {record['test_loss']:.4f}"
        )
        print(json.dumps(record))
    return record
