"""What a run tells: a live bar or plain lines, and JSON lines and TensorBoard events in the output folder."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_logger = logging.getLogger("vision_mamba")


class Reporter:
    """Progress of a run, from the main process only.

    Args:
        output_dir: folder for `log.txt` (JSON lines, one per epoch) and TensorBoard's events; None writes no files.
        enabled: false in all processes but the main one.
        print_every_steps: steps between plain lines where standard error is no terminal.
    """

    def __init__(self, output_dir: Path | None, *, enabled: bool, print_every_steps: int) -> None:
        self._enabled, self._every = enabled, max(1, print_every_steps)
        self._log_path = output_dir / "log.txt" if output_dir is not None and enabled else None
        self._writer = None
        if self._log_path is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output_dir / "tensorboard"))
        self._live = enabled and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: Any = None

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Begin a pass of `total` steps, `done` of them already behind."""
        self._label, self._total, self._done = label, total, done
        self._begun, self._first = time.perf_counter(), done
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(label, total=total, completed=done, note="")

    def step(self, *, loss: float, images: int, lr: float | None = None) -> None:
        """One step done.

        Args:
            loss: its loss.
            images: images of the step over all processes.
            lr: learning rate, if it is a training step.
        """
        self._done += 1
        if not self._enabled:
            return
        seconds = time.perf_counter() - self._begun
        rate = images * (self._done - self._first) / max(seconds, 1e-9)
        note = f"loss {loss:.4f}  {rate:,.0f} images/s" + ("" if lr is None else f"  lr {lr:.2e}")
        if self._progress is not None:
            self._progress.update(self._task, advance=1, note=note)
        elif self._done % self._every == 0 or self._done == self._total:
            left = seconds / (self._done - self._first) * (self._total - self._done)
            _logger.info("%s  %d/%d  %s  %.0f s left", self._label, self._done, self._total, note, left)

    def finish(self) -> None:
        """End the pass that `start` began."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def epoch(self, record: dict[str, Any]) -> None:
        """Append one epoch's figures to the log and to TensorBoard.

        Args:
            record: plain values, with the epoch under "epoch".
        """
        if not self._enabled:
            return
        if self._log_path is not None:
            with self._log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in record.items():
                if name != "epoch" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """End the pass and close the files."""
        self.finish()
        if self._writer is not None:
            self._writer.close()
