"""Trackers of a run's figures: TensorBoard, Weights & Biases, MLflow, behind one interface."""

import hashlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torchvision.utils import make_grid

from vim.errors import UserError
from vim.flags import Run

_logger = logging.getLogger("vision_mamba")


class Tracker(Protocol):
    """The interface of all trackers."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by name at a step."""

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """One picture (3, H, W) in [0, 1]."""

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Distribution of a tensor's values."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Events in `folder`/tensorboard; those after `first_step`, which a resumed run repeats, are hidden."""

    def __init__(self, folder: Path, args: Run, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        self._writer.add_image(name, image, step)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self._writer.add_histogram(name, values, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; its identity follows from the folder, so that a resumed run continues it."""

    def __init__(self, folder: Path, args: Run, first_step: int) -> None:
        import wandb

        self._wandb = wandb
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=args.project, name=folder.name, dir=str(folder), id=identity, resume="allow", config=vars(args)
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        # Steps and epochs count differently, and W&B's own step may only grow: each group brings its own.
        axis = "epoch" if "epoch" in values else "step"
        self._run.log({**values, axis: step})

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        self._run.log({name: self._wandb.Image(_pixels(image)), "step": step})

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self._run.log({name: self._wandb.Histogram(values.float().cpu().numpy()), "epoch": step})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, else in files below the run's folder."""

    def __init__(self, folder: Path, args: Run, first_step: int) -> None:
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # Its newer versions ask for consent to plain files, which no server or database stands behind.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
        mlflow.set_experiment(args.project)
        known = folder / "mlflow_run_id.txt"
        if first_step and known.is_file():
            mlflow.start_run(run_id=known.read_text().strip())
            return
        run = mlflow.start_run(run_name=folder.name)
        known.write_text(run.info.run_id)
        mlflow.log_params({k: str(v)[:500] for k, v in vars(args).items()})

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics({k: float(v) for k, v in values.items()}, step=step)

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        self._mlflow.log_image(_pixels(image), f"{name}.png")

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        # MLflow has no histograms: mean and deviation instead.
        values = values.float()
        self.scalars({f"{name}/mean": values.mean().item(), f"{name}/std": values.std().item()}, step)

    def close(self) -> None:
        self._mlflow.end_run()


def check_trackers(args: Run) -> None:
    """Check what the trackers need before anything is written.

    Raises:
        UserError: a tracker's library is missing, or there is no folder for its files.
    """
    if args.eval:
        return  # has none, whatever trackers the checkpoint's run had
    for name in set(args.trackers) & {"wandb", "mlflow"}:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--trackers {name} needs {name}: pip install 'vision-mamba[{name}]'")
        if not args.output_dir:
            raise UserError(f"--trackers {name} keeps files beside the run's: pass --output-dir")


def build_trackers(folder: Path | None, args: Run, first_step: int) -> list[Tracker]:
    """The trackers that `--trackers` names, of the main process.

    Args:
        folder: of the run; None has no trackers.
        args: parsed flags, checked by `check_trackers`.
        first_step: of this process; above 0 in a resumed run.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
    if folder is None:
        return []
    trackers = []
    for name in dict.fromkeys(args.trackers):
        if name == "none":
            continue
        try:
            trackers.append(kinds[name](folder, args, first_step))
        except Exception as error:  # of three libraries, their servers and disks: no reason to lose a run
            said = str(error).strip().splitlines() or [type(error).__name__]
            _logger.warning("the tracker %s does not start (%s): the run goes on without it", name, said[0][:200])
    return trackers


def picture(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], count: int = 16) -> torch.Tensor:
    """The first images of a normalised batch (B, C, H, W) as one picture (3, H', W') in [0, 1]; of clips, a frame."""
    images = images if images.dim() == 4 else images[:, :, images.shape[2] // 2]
    images = images[:count].detach().float().cpu()
    shape = (1, -1, 1, 1)
    images = images * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    return make_grid(images.clamp(0, 1), nrow=4)


def _pixels(image: torch.Tensor) -> np.ndarray:
    return (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
