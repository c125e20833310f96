"""One training loop for detection and segmentation: accelerate, timm's groups and schedule, torchmetrics."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vim.dense.features import layer_decay_groups
from vim.dense.standalone.data import EndlessSampler, Seeded
from vim.dense.standalone.task import Spec, Task, features_of
from vim.engine.checkpoints import save_atomically
from vim.engine.signals import handled
from vim.errors import UserError
from vim.models.checkpoint import CheckpointError, load_checkpoint

_logger = logging.getLogger("vision_mamba")

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"


@dataclass
class Schedule:
    """How a model is trained.

    Attributes:
        iterations: steps of the optimizer.
        batch_size: images per step and process.
        lr: highest learning rate, of heads and pyramid.
        weight_decay: of AdamW.
        layer_decay: factor of the learning rate from block to block.
        clip_grad: largest norm of the gradient; 0 for any.
        warmup: steps in which the rate rises.
        interval: steps from evaluation to evaluation, each with a checkpoint.
        seed: of all random numbers.
        num_workers: loader processes.
        amp: "no", "bf16" or "fp16".
    """

    iterations: int
    batch_size: int
    lr: float
    weight_decay: float
    layer_decay: float
    clip_grad: float
    warmup: int
    interval: int
    seed: int
    num_workers: int
    amp: str


class Trainer:
    """Trains a model and keeps its last and its best checkpoint.

    Each step's random numbers follow from the seed and the step, so a resumed run takes the same steps.

    Args:
        task: detection or segmentation.
        model: with initial or pretrained weights.
        spec: of the model.
        schedule: of the run.
        train_data: with augmentation.
        eval_data: without.
        folder: for checkpoints and TensorBoard; made if missing.

    Raises:
        UserError: fp16 without a GPU.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        spec: Spec,
        schedule: Schedule,
        train_data: Dataset,
        eval_data: Dataset,
        folder: Path,
    ) -> None:
        if schedule.amp == "fp16" and not torch.cuda.is_available():
            raise UserError("--amp fp16 needs a GPU: pass bf16, or leave it out")
        self.task, self.spec, self.schedule, self.folder = task, spec, schedule, folder
        self.train_data, self.eval_data = train_data, eval_data
        # Without being told so, accelerate takes processes on CPUs for strangers.
        self.accelerator = Accelerator(mixed_precision=schedule.amp, cpu=not torch.accelerator.is_available())
        name, features = features_of(model)
        groups = layer_decay_groups(
            model.named_parameters(), features.vim, f"{name}.vim.", schedule.layer_decay, schedule.weight_decay
        )
        optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
        self.rates = CosineLRScheduler(
            optimizer,
            t_initial=max(schedule.iterations, schedule.warmup + 1),
            lr_min=schedule.lr / 100,
            warmup_t=schedule.warmup,
            warmup_lr_init=schedule.lr / 100,
            t_in_epochs=False,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step, self.best = 0, -math.inf
        self.metrics: dict[str, float] = {}

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this trainer.

        Raises:
            CheckpointError: it cannot be read.
            UserError: it is of another model.
        """
        content = read(path)
        load_weights(self._bare, content, path)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            if self.accelerator.scaler is not None and content.get("scaler"):
                self.accelerator.scaler.load_state_dict(content["scaler"])
            self.step, self.best, self.metrics = int(content["step"]), float(content["best"]), dict(content["metrics"])
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be continued ({error}): give a checkpoint of this run, or its weights by --finetune"
            ) from error
        _logger.info("resuming from %s at step %d of %d", path, self.step, self.schedule.iterations)

    def train(self) -> dict[str, float]:
        """Train to the end of the schedule, or until a signal; gives the last metrics.

        Raises:
            UserError: the loss is not finite any more.
        """
        plan, accelerator = self.schedule, self.accelerator
        writer = SummaryWriter(str(self.folder)) if accelerator.is_main_process else None
        batches = self._batches()
        bar = tqdm(
            total=plan.iterations, initial=self.step, desc="training", unit="step",
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        with bar, _stop_on_signals(accelerator):
            while self.step < plan.iterations:
                losses = self._one_step(next(batches))
                bar.update()
                if self.step % 10 == 0 or self.step == plan.iterations:
                    values = {name: float(value) for name, value in losses.items()}
                    self._check_finite(sum(values.values()))
                    bar.set_postfix(loss=f"{sum(values.values()):.3f}")
                    if writer:
                        for name, value in {**values, "lr": self._rate()}.items():
                            writer.add_scalar(f"train/{name}", value, self.step)
                stopping = accelerator.check_trigger()
                if not stopping and (self.step % plan.interval == 0 or self.step == plan.iterations):
                    self.metrics = self.evaluate()
                    for name, value in self.metrics.items() if writer else ():
                        writer.add_scalar(f"eval/{name}", value, self.step)
                    if writer:
                        tqdm.write(f"step {self.step}: {say(self.metrics)}")
                    self.save()
                elif stopping:
                    self.save()
                    tqdm.write(f"stopped by a signal at step {self.step}: --resume continues the run")
                    break
        if writer:
            writer.close()
        return self.metrics

    def _batches(self) -> Iterator[Any]:
        plan, world = self.schedule, self.accelerator.num_processes
        sampler = EndlessSampler(
            len(self.train_data), plan.seed, self.step * plan.batch_size * world, self.accelerator.process_index, world
        )
        return iter(
            DataLoader(
                Seeded(self.train_data, plan.seed),
                plan.batch_size,
                sampler=sampler,
                num_workers=plan.num_workers,
                collate_fn=self.task.collate,
                pin_memory=self.accelerator.device.type == "cuda",
            )
        )

    def _one_step(self, batch: Any) -> dict[str, torch.Tensor]:
        # Heads draw samples and blocks drop paths: their numbers follow from the step.
        torch.manual_seed(1_000_003 * (self.schedule.seed + 1) + self.step * 1009 + self.accelerator.process_index)
        self.model.train()
        self.rates.step_update(self.step)
        with self.accelerator.autocast():
            losses = self.task.loss(self.model, batch, self.accelerator.device)
            total = sum(losses.values())
        self.accelerator.backward(total)
        if self.schedule.clip_grad:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.schedule.clip_grad)
            if self.accelerator.scaler is None:
                self._check_finite(float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: value.detach() for name, value in losses.items()}

    def _check_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"loss or gradient is {value} at step {self.step}: pass a smaller --lr or --amp no; --resume continues "
                "from the last checkpoint"
            )

    def _rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def _bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def evaluate(self) -> dict[str, float]:
        """Metrics in percent over the validation images; every process takes its share."""
        model = self._bare.eval()
        indices = range(self.accelerator.process_index, len(self.eval_data), self.accelerator.num_processes)
        with self.accelerator.autocast():
            return self.task.evaluate(model, self.spec, self.eval_data, indices)

    def save(self) -> None:
        """Write the last checkpoint, and the best if this is it.

        Raises:
            UserError: the disk is full, or the folder is gone.
        """
        value = self.metrics.get(self.task.metric, -math.inf)
        names = [LAST] if value <= self.best else [BEST, LAST]
        self.best = max(self.best, value)
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        content = {
            "model": self._bare.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(), "step": self.step, "best": self.best,
            "metrics": self.metrics, "task": self.task.name, "spec": asdict(self.spec),
            "schedule": asdict(self.schedule),
        }  # fmt: skip
        for name in names:
            try:
                save_atomically(content, self.folder / name)
            except (OSError, RuntimeError) as error:  # RuntimeError: of torch's archive writer, on a full disk
                raise UserError(
                    f"{self.folder / name} cannot be written ({error}): the checkpoint before it is kept; make room, "
                    "then continue with --resume"
                ) from error


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of this trainer.

    Raises:
        CheckpointError: it cannot be read, or another trainer wrote it.
    """
    content = load_checkpoint(path)
    spec = content.get("spec")
    if not isinstance(spec, dict) or set(spec) != set(Spec.__dataclass_fields__) or "model" not in content:
        raise CheckpointError(
            f"{path} holds no dense model with its description: give a checkpoint that this command wrote; a "
            "classifier goes to --finetune"
        )
    return content


def load_weights(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's weights into the model that its description builds.

    Raises:
        UserError: they do not fit.
    """
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} holds weights of another model: {reason}") from error


def say(metrics: dict[str, float]) -> str:
    """Metrics in one line."""
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())


@contextmanager
def _stop_on_signals(accelerator: Accelerator) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 (of SLURM) ask all processes to save and stop after their step."""

    def stop(*_: Any) -> None:
        accelerator.set_trigger()

    with handled(("SIGTERM", "SIGUSR1"), stop):
        yield
