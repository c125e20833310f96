"""Learning-rate schedules: timm's, with a complete plateau schedule."""

from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from vim.flags import Schedule


class Plateau(PlateauLRScheduler):
    """timm's plateau schedule with a cooldown after each drop, optional warm-up, and its state in checkpoints.

    Args:
        optimizer: whose learning rate it sets.
        cooldown_epochs: epochs after a drop that do not count towards the patience.
        kwargs: of timm's class.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, cooldown_epochs: int, **kwargs: Any) -> None:
        super().__init__(optimizer, **kwargs)
        self.lr_scheduler.cooldown = cooldown_epochs

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Set the rate after `epoch`; a larger `metric` is better."""
        # timm counts epoch 0 as warm-up even without any, and would keep its rate.
        super().step(epoch if self.warmup_t else max(epoch, 1), metric)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step."""
        return {"plateau": self.lr_scheduler.state_dict(), "restore_lr": self.restore_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.lr_scheduler.load_state_dict(state_dict["plateau"])
        self.restore_lr = state_dict["restore_lr"]


def build_scheduler(optimizer: torch.optim.Optimizer, args: Schedule) -> Scheduler:
    """The schedule that `--sched` names, stepped once per epoch."""
    noise = {"noise_pct": args.lr_noise_pct, "noise_std": args.lr_noise_std, "noise_seed": args.seed}
    warmup = {"warmup_lr": args.warmup_lr, "warmup_epochs": args.warmup_epochs}
    if args.sched == "plateau":
        span = args.lr_noise and [n * args.epochs for n in args.lr_noise]
        return Plateau(
            optimizer, cooldown_epochs=args.cooldown_epochs, decay_rate=args.decay_rate,
            patience_t=args.patience_epochs, lr_min=args.min_lr, warmup_t=args.warmup_epochs,
            warmup_lr_init=args.warmup_lr, noise_range_t=span, **noise,
        )  # fmt: skip
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        decay_milestones=args.decay_milestones, decay_rate=args.decay_rate, cooldown_epochs=args.cooldown_epochs,
        min_lr=args.min_lr, warmup_prefix=False, noise=args.lr_noise, **warmup, **noise,
    )  # fmt: skip
    return scheduler
