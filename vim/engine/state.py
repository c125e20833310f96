"""Everything that changes during training; writing it to a checkpoint and reading it back."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vim.engine.inherited import own_flags
from vim.errors import UserError
from vim.flags import Flags
from vim.models.checkpoint import stored_grid

_logger = logging.getLogger("vision_mamba")

# Flags that shape the learning rate: where one differs from the checkpoint's, the schedule is that of the new flags.
_SCHEDULE_FLAGS = (
    "epochs", "sched", "lr", "lr_noise", "lr_noise_pct", "lr_noise_std", "warmup_lr", "min_lr", "decay_epochs",
    "warmup_epochs", "cooldown_epochs", "patience_epochs", "decay_rate", "batch_size", "grad_accum_steps", "unscale_lr",
)  # fmt: skip


# Optimizer settings, apart from the learning rate, that come from the command and not from the checkpoint.
_HYPERPARAMETERS = ("weight_decay", "betas", "eps", "momentum")


@dataclass
class TrainState:
    """Everything that changes during training.

    Attributes:
        model: the bare model; `forward` is the same model sharded, replicated or compiled.
        epoch, step: the next to run; a step is one batch of each process.
        best: best top-1 so far, percent.
        skipped: updates skipped for a loss or gradient that was not finite.
        loss_sum, norm_sum, updates: sums over this epoch's updates so far.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler | None
    epoch: int = 0
    step: int = 0
    best: float = 0.0
    skipped: int = 0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    updates: int = 0
    stop_requested: bool = field(default=False, compare=False)

    _COUNTERS = ("epoch", "step", "best", "skipped", "loss_sum", "norm_sum", "updates")

    def next_epoch(self) -> None:
        """Count one epoch as done."""
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.norm_sum, self.updates = 0.0, 0.0, 0

    def content(self, *, fsdp: bool) -> dict[str, Any]:
        """What a checkpoint holds of it. Shards are gathered, so all processes must call this where `fsdp` is set."""
        options = StateDictOptions(full_state_dict=fsdp, cpu_offload=fsdp)
        return {
            "model": get_model_state_dict(self.model, options=options),
            "model_ema": None if self.ema is None else get_model_state_dict(self.ema.module, options=options),
            # By parameter name, so that a run can continue with other shards or none.
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            **{name: getattr(self, name) for name in self._COUNTERS},
        }

    def restore(self, checkpoint: dict[str, Any], args: Flags, world_size: int) -> None:
        """Continue from a checkpoint's content; the model's own weights are loaded already.

        Raises:
            UserError: it does not fit this run.
        """
        options = StateDictOptions(full_state_dict=True)
        if (before := (own_flags(checkpoint) or {}).get("opt", args.opt)) != args.opt:
            raise UserError(
                f"the checkpoint was trained with --opt {before} and this run has --opt {args.opt}: continue with the "
                "same optimizer, or start from the weights alone by --finetune"
            )
        grid, own = stored_grid(checkpoint), getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is not None and own is not None and grid != tuple(own):
            # With as many patches all shapes agree, and moments and averages would be taken for those of other places.
            raise UserError(
                f"the checkpoint's images have a grid of {grid[0]} × {grid[1]} patches and this run's is {own[0]} × "
                f"{own[1]}: --resume goes on with the same --input-size, --finetune starts from the weights alone"
            )
        try:
            lr = [group["lr"] for group in self.optimizer.param_groups]
            chosen = [{k: group[k] for k in _HYPERPARAMETERS if k in group} for group in self.optimizer.param_groups]
            _check_optimizer(checkpoint["optimizer"], get_optimizer_state_dict(self.model, self.optimizer))
            set_optimizer_state_dict(self.model, self.optimizer, checkpoint["optimizer"], options=options)
            for group, values in zip(self.optimizer.param_groups, chosen, strict=True):
                group.update(values)
            if self.scaler is not None and checkpoint["scaler"] is not None:
                _check_like(checkpoint["scaler"], self.scaler.state_dict(), "the loss scaler")
                self.scaler.load_state_dict(checkpoint["scaler"])
            if self.ema is not None and checkpoint["model_ema"] is not None:
                set_model_state_dict(self.ema.module, checkpoint["model_ema"], options=options)
            for name in self._COUNTERS:
                setattr(self, name, checkpoint[name])
            saved, before = own_flags(checkpoint), checkpoint["world_size"]
            changed = [n for n in _SCHEDULE_FLAGS if n in saved and saved[n] != getattr(args, n)]
            if changed or before != world_size:
                what = ", ".join(f"--{n.replace('_', '-')}" for n in changed) or "the number of processes"
                _logger.warning("%s changed since the checkpoint: the learning rate follows the new schedule", what)
                for group, value in zip(self.optimizer.param_groups, lr, strict=True):
                    group["lr"] = value
                if self.epoch > 0:
                    self.scheduler.step(self.epoch - 1, self.best)
            else:
                _check_like(checkpoint["lr_scheduler"], self.scheduler.state_dict(), "the schedule")
                self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
            samples, now = self.step * saved["batch_size"] * before, args.batch_size * world_size
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint's training state does not fit this run: {error}; --resume continues with the same "
                "model, image size and optimizer, --finetune starts from the weights alone"
            ) from error
        if samples % now:
            raise UserError(
                f"the checkpoint lies {samples} samples into an epoch, no multiple of {now}, the images of a step now: "
                f"resume with --batch-size {saved['batch_size']} on {before} processes, or from an epoch's end"
            )
        self.step = samples // now


def _check_optimizer(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse an optimizer state for other parameters: torch accepts any shape, and its kernels rely on it.

    Args:
        saved, own: from `get_optimizer_state_dict`, by parameter name.

    Raises:
        ValueError: names, groups, shapes or types that differ.
    """
    if not all(isinstance(saved.get(key), kind) for key, kind in (("state", dict), ("param_groups", list))):
        raise ValueError("the optimizer has no state by parameter name")
    if unknown := sorted(map(str, set(saved["state"]) - set(own["state"]))):
        raise ValueError(f"the optimizer has a state of {unknown[0]}, which the model has not")
    for name, state in saved["state"].items():
        _check_like(state, own["state"][name], f"the optimizer's state of {name}")
    names = [_names(groups["param_groups"]) for groups in (saved, own)]
    if names[0] != names[1]:
        sizes = [", ".join(str(len(group)) for group in groups) for groups in names]
        raise ValueError(f"the optimizer has groups of {sizes[0]} parameters, this run of {sizes[1]}")
    for group, mine in zip(saved["param_groups"], own["param_groups"], strict=True):
        for key in (set(group) & set(mine)) - {"params"}:
            _check_like(group[key], mine[key], f"the optimizer's {key}")


def _names(groups: list[Any]) -> list[list[str]]:
    params = [group.get("params") if isinstance(group, dict) else None for group in groups]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in params):
        raise ValueError("the optimizer's groups name no parameters")
    return [sorted(names) for names in params]


def _check_like(saved: Any, own: Any, what: str) -> None:
    """Refuse a saved value whose keys, lengths, shapes or types differ from this run's.

    Raises:
        ValueError: see above.
    """
    if isinstance(own, dict):
        if not isinstance(saved, dict) or set(saved) != set(own):
            raise ValueError(f"{what} has other entries than this run's: {', '.join(map(str, own))}")
        for key, value in own.items():
            _check_like(saved[key], value, f"{what}: {key}")
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise ValueError(f"{what} is no list of {len(own)}")
        for value, mine in zip(saved, own, strict=True):
            _check_like(value, mine, what)
    elif isinstance(own, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or saved.layout != torch.strided:
            raise ValueError(f"{what} is no tensor")
        if saved.shape != own.shape or saved.dtype != own.dtype:
            raise ValueError(f"{what} is {tuple(saved.shape)} {saved.dtype}, this run's {tuple(own.shape)} {own.dtype}")
        if saved.untyped_storage().nbytes() < saved.numel() * saved.element_size():
            raise ValueError(f"{what} is an expanded tensor")
    elif isinstance(own, int | float):
        if not isinstance(saved, int | float) and saved is not None:
            raise ValueError(f"{what} is no number")
    elif isinstance(saved, torch.Tensor | dict | list):
        raise ValueError(f"{what} is a {type(saved).__name__}")
