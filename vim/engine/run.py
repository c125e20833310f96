"""From flags to a finished run: build data, model and optimizer, then train or evaluate."""

import logging
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from vim.data import build_datasets, build_loaders, seed_all
from vim.engine import checkpoints
from vim.engine.arguments import notices, parse_args, save_config
from vim.engine.build import build_criterion, build_model, build_training
from vim.engine.checkpoints import CheckpointManager
from vim.engine.distributed import DistributedContext, choose_context, count_bad_images, in_main_process
from vim.engine.evaluation import PerClass, evaluate, read_class_index
from vim.engine.inherited import (
    check_model_options,
    class_names,
    continue_flags,
    head_size,
    load_weights,
    match_classes,
    read_weights,
)
from vim.engine.lock import locked, requeued, wait_for_predecessor
from vim.engine.losses import TrainingLoss
from vim.engine.pretraining import PretrainingCriterion, build_pretraining, evaluate_pretraining
from vim.engine.reporting import Reporter, to_json
from vim.engine.signals import handled
from vim.engine.state import TrainState
from vim.engine.training import build_backward, train_one_epoch
from vim.environment import check_kernels
from vim.errors import UserError, exit_status
from vim.flags import Flags, Optimisation
from vim.models.checkpoint import has_ema

_logger = logging.getLogger("vision_mamba")


def set_up_logging() -> None:
    """Log only this project's lines to standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # timm and PIL log details of their own at this level.
    logging.getLogger("timm").setLevel(logging.WARNING)
    # A declined backend is worth a line only if the slow reference runs instead.
    logging.getLogger("vision_mamba.backend").setLevel(logging.WARNING)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `main.py`: its exit status, see `exit_status`."""
    set_up_logging()
    try:
        return exit_status(lambda: run(argv))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(argv: list[str] | None = None) -> dict[str, float]:
    """Train or evaluate; returns the last figures, with "stopped" among them if a signal ended the run.

    Raises:
        BackendError: VIM_BACKEND or VIM_CPU_ISA asks for something that is not available.
        UserError: see `parse_args`, `build_datasets`, `build_model`, and the checkpoint's and output folder's errors.
    """
    args = parse_args(argv)
    context = choose_context(args)
    if not context.is_main:
        _logger.setLevel(logging.ERROR)
    check_kernels(context.device.type)
    if args.resume == "auto" and args.output_dir and not args.eval and requeued():
        in_main_process(lambda: wait_for_predecessor(Path(args.output_dir)), context)
    checkpoint = checkpoints.read(args.resume, args.output_dir) if args.resume else None
    own = checkpoint is not None and checkpoints.is_own(checkpoint)
    if own:
        args = continue_flags(checkpoint, argv)
    weights = checkpoint
    if checkpoint is None and args.finetune:
        weights = read_weights(args.finetune)
        check_model_options(weights, args)
    if args.eval and weights is None:
        raise UserError(f"--resume auto found no checkpoint to evaluate in {args.output_dir}: train first, or name one")
    seed_all(args.seed)
    train_set, eval_set, num_classes = build_datasets(args)
    columns = None
    if args.eval:
        columns, num_classes = _evaluated_classes(args, weights, eval_set, num_classes)
    elif own and (numbers := match_classes(weights, train_set, training=True)) is not None:
        known = class_names(weights)
        num_classes = len(known)
        train_set.relabel(numbers, known)
        eval_set.relabel(numbers, known)
    model = build_model(args, num_classes)
    if args.pretrain != "none":
        model = build_pretraining(model, args)
    if weights is not None:
        finetuned = weights is not checkpoint and not args.eval
        classes = getattr(train_set, "classes", None) if finetuned else None
        load_weights(model, weights, reset_head=finetuned, classes=classes)
    model.to(context.device)
    train_loader, eval_loader = build_loaders(
        args, train_set, eval_set, world_size=context.world_size, rank=context.rank
    )
    if args.eval:
        return _evaluate_only(model, weights, eval_loader, columns, args, context)
    pretraining = args.pretrain != "none"
    criterion = PretrainingCriterion() if pretraining else build_criterion(args, context, num_classes)
    state = build_training(model, args, context)
    if pretraining:
        state.best = -math.inf
    if own:
        state.restore(checkpoint, args, context.world_size)
    elif checkpoint is not None:
        _logger.warning("the checkpoint holds no run of this project: its weights are loaded, the run starts afresh")
    for notice in notices(args, len(train_loader)):
        _logger.warning(notice)
    with _output_dir(args, context) as output_dir:
        done = state.epoch * len(train_loader) + state.step
        reporter = Reporter(output_dir, args, enabled=context.is_main, first_step=done)
        try:
            with _stopping_on_signals(state):
                manager = CheckpointManager(output_dir, args, context, getattr(train_set, "classes", None))
                return _train(state, train_loader, eval_loader, criterion, args, context, reporter, manager)
        finally:
            reporter.close()


def _evaluated_classes(
    args: Flags, weights: dict[str, Any], eval_set: Any, num_classes: int
) -> tuple[list[int] | None, int]:
    """The model's output for each class of the set, None where they are the same, and the model's number of classes.

    Raises:
        UserError: the model lacks classes of the set, or they cannot be matched.
    """
    if args.class_index:
        names = [str(c) for c in getattr(eval_set, "classes", range(num_classes))]
        num_classes = head_size(args, weights)
        return read_class_index(Path(args.class_index), names, num_classes), num_classes
    columns = match_classes(weights, eval_set, training=False)
    return columns, num_classes if columns is None else len(class_names(weights))


@contextmanager
def _stopping_on_signals(state: TrainState) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 (of submitit) ask the run to save and stop.

    A second Ctrl-C stops it where it is.
    """

    def stop(signum: int, _: Any) -> None:
        if signum == signal.SIGINT and state.stop_requested:
            raise KeyboardInterrupt
        state.stop_requested = True

    with handled(("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"), stop):
        yield


@contextmanager
def _output_dir(args: Flags, context: DistributedContext) -> Iterator[Path | None]:
    """The run's folder, which is made, locked by the main process, and holds the flags.

    Raises:
        UserError: it cannot be written, or another run writes into it; in all processes alike.
    """
    if not args.output_dir:
        _logger.warning("no --output-dir: nothing of this run will be kept")
        yield None
        return
    path = Path(args.output_dir)
    with ExitStack() as stack:

        def prepare() -> None:
            try:
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path))
                save_config(args, path / "config.yaml")
            except OSError as error:
                raise UserError(f"--output-dir {path} cannot be written: {error.strerror}") from error

        in_main_process(prepare, context)
        yield path


def _train(
    state: TrainState,
    train_loader: Any,
    eval_loader: Any,
    criterion: TrainingLoss,
    args: Flags,
    context: DistributedContext,
    reporter: Reporter,
    manager: CheckpointManager,
) -> dict[str, float]:
    record: dict[str, Any] = {}
    backward = build_backward(state, criterion, args, context)
    if state.epoch >= args.epochs:
        _logger.info("all %d epochs are done: pass more --epochs to go on", args.epochs)
    while state.epoch < args.epochs:
        epoch = state.epoch
        trained = train_one_epoch(state, train_loader, backward, args, context, reporter, manager)
        tested = None if trained is None else _evaluate_both(state, eval_loader, args, context, reporter)
        if tested is None:
            path = manager.save(state)
            _logger.info(
                "stopped by a signal in epoch %d after step %d: %s", epoch + 1, state.step,
                f"{path} is saved, continue with --resume auto" if path else "nothing is saved without --output-dir",
            )  # fmt: skip
            return {**record, "stopped": True}
        # Published order: the schedule moves by the index of the epoch just finished.
        score = tested["test_acc1"] if "test_acc1" in tested else -tested["test_loss"]
        state.scheduler.step(epoch, score)
        state.next_epoch()
        improved = score > state.best
        state.best = max(state.best, score)
        bad = sum(count_bad_images(loader.dataset, context) for loader in (train_loader, eval_loader))
        best = {"best_acc1": state.best} if "test_acc1" in tested else {"best_loss": -state.best}
        record = {"epoch": epoch, **trained, **tested, **best, "bad_images": bad}
        # The line first: a run killed in between writes it again, which readers of the log allow for.
        reporter.epoch(record)
        manager.save_epoch(state, improved=improved)
    reporter.summary()
    return record


def _evaluate_both(
    state: TrainState, eval_loader: Any, args: Flags, context: DistributedContext, reporter: Reporter
) -> dict[str, float] | None:
    """Figures of the model, and of its average under names that begin with "ema_"; None if a stop was requested."""
    stop = {"stop_requested": lambda: state.stop_requested}
    measure = evaluate if args.pretrain == "none" else evaluate_pretraining
    tested = measure(state.model, eval_loader, args, context, reporter, **stop)
    if tested is None or state.ema is None:
        return tested
    averaged = state.ema.module.to(context.device)
    figures = measure(averaged, eval_loader, args, context, reporter, **stop)
    if args.model_ema_force_cpu:
        averaged.cpu()
    return None if figures is None else tested | {f"ema_{k}": v for k, v in figures.items()}


def _evaluate_only(
    model: nn.Module,
    weights: dict[str, Any],
    eval_loader: Any,
    columns: list[int] | None,
    args: Flags,
    context: DistributedContext,
) -> dict[str, float]:
    reporter = Reporter(None, args, enabled=context.is_main)
    data = eval_loader.dataset
    names = getattr(data, "classes", range(len(columns) if columns else model.num_classes))
    per_class = PerClass([str(name) for name in names]) if args.per_class_csv else None
    record = evaluate(model, eval_loader, args, context, reporter, per_class, columns=columns)
    _check_finite(record, args)
    if per_class is not None:
        per_class.write(Path(args.per_class_csv), context)
    if has_ema(weights):
        load_weights(model, weights, use_ema=True)
        averaged = evaluate(model, eval_loader, args, context, reporter, columns=columns)
        _check_finite(averaged, args)
        record |= {f"ema_{k}": v for k, v in averaged.items()}
    if context.is_main:
        for prefix, what in (("", "test images"), ("ema_", "test images, averaged weights")):
            if f"{prefix}test_acc1" in record:
                count, acc1, acc5, loss, rate = (
                    record[f"{prefix}test_{k}"] for k in ("images", "acc1", "acc5", "loss", "images_per_s")
                )
                print(f"{count} {what}: top-1 {acc1:.3f} %  top-5 {acc5:.3f} %  loss {loss:.4f}  {rate:.0f} images/s")
        print(to_json(record))
    return record


def _check_finite(record: dict[str, float], args: Optimisation) -> None:
    if not math.isfinite(record["test_loss"]):
        precision = f"; try float32 in place of --amp-dtype {args.amp_dtype}" if args.if_amp else ""
        raise UserError(
            f"the loss over the {record['test_images']} test images is {record['test_loss']}: the model's outputs are "
            f"not finite, so these weights are of no use{precision}"
        )
