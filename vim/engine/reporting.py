"""What a run reports: a live bar or plain lines, its log in the output folder, trackers, and a summary at the end."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from vim.data.transforms import normalisation
from vim.engine.profiling import StepProfiler
from vim.engine.trackers import Tracker, build_trackers, picture
from vim.flags import Flags

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_logger = logging.getLogger("vision_mamba")


def memory_mib(device: torch.device) -> float:
    """Largest memory so far in MiB: the tensors' on a GPU, the whole process's on a CPU, 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON, with null for NaN and infinity, which JSON does not have."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False)


class _LogFile(logging.FileHandler):
    """The lines of `run.log`; says once where they cannot be written, and goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Of the base class: where a line could not be written."""
        if not self._failed:
            self._failed = True
            _logger.warning("%s cannot be written (%s): the run goes on without it", self.baseFilename, reason_of())

    def close(self) -> None:
        """Close the file, whose last bytes may not find room."""
        with suppress(OSError):
            super().close()


def reason_of() -> str:
    """What the exception at hand says, in one line."""
    error = sys.exc_info()[1]
    text = str(getattr(error, "strerror", None) or error or "").strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


class Reporter:
    """Progress of a run, from the main process only. A file or a tracker that fails is said once; the run goes on.

    Args:
        output_dir: folder for `log.txt` (JSON lines, one per epoch), `run.log` (plain lines) and the trackers' files;
            None writes no files.
        args: parsed flags.
        enabled: false in all processes but the main one.
        first_step: updates that the run has already done.
    """

    def __init__(self, output_dir: Path | None, args: Flags, *, enabled: bool, first_step: int = 0) -> None:
        self._enabled, self._every, self._args = enabled, max(1, args.print_every_steps), args
        self._folder = output_dir if enabled else None
        self._unwritten: set[Path] = set()
        self._trackers = build_trackers(output_dir, args, first_step) if enabled and not args.eval else []
        self._file: logging.FileHandler | None = None
        if self._folder is not None:
            try:
                self._file = _LogFile(self._folder / "run.log")
                _logger.addHandler(self._file)
            except OSError:
                self._say_unwritten(self._folder / "run.log")
            if _logger.level == logging.NOTSET:
                # The file gets its lines even if the caller has not set up logging.
                _logger.setLevel(logging.INFO)
        self._live = enabled and sys.stderr.isatty()
        self._on_gpu = args.device == "cuda" and torch.cuda.is_available()
        self._progress: Progress | None = None
        self._task: Any = None
        self._records: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._samples_shown = first_step > 0
        self._profiler: StepProfiler | None = None
        if args.profile and not args.eval and self._folder is not None:
            self._profiler = StepProfiler(args.profile, self._folder / "profile")

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Begin a pass of `total` steps, of which `done` are already done."""
        self._label, self._total, self._done = label, total, done
        self._begun, self._first = time.perf_counter(), done
        self._images, self._data_wait, self._device_wait = 0, 0.0, 0.0
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(label, total=total, completed=done, note="")

    def step(
        self, *, loss: float, images: int, steps: int = 1, train: dict[str, float] | None = None,
        data_wait: float = 0.0, device_wait: float = 0.0, at: int = 0,
    ) -> None:  # fmt: skip
        """Report finished steps.

        Args:
            loss: their loss.
            images: their images, over all processes.
            steps: how many.
            train: further figures of a training step by name, "lr" among them.
            data_wait: seconds that this process waited for their data.
            device_wait: seconds that it then waited for the device.
            at: updates of the whole run so far, for the trackers.
        """
        before = self._done
        self._done, self._images = self._done + steps, self._images + images
        self._data_wait, self._device_wait = self._data_wait + data_wait, self._device_wait + device_wait
        if self._profiler is not None and train is not None:
            self._profiler.step()
        if not self._enabled:
            return
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        rate, done = self._images / seconds, self._done - self._first
        note = f"loss {loss:.4f}  {rate:,.0f} images/s"
        if train is not None:
            note += f"  step {1e3 * seconds / done:.0f} ms ({self._parts(seconds, done)})  lr {train['lr']:.2e}"
        if self._progress is not None:
            self._progress.update(self._task, advance=steps, note=note)
        if self._done // self._every > before // self._every or self._done >= self._total:
            left = seconds / done * max(self._total - self._done, 0)
            self._line(f"{self._label}  {self._done}/{self._total}  {note}  {left:.0f} s left")
            if train is not None:
                figures = {
                    "loss": loss, "images_per_s": rate, "step_ms": 1e3 * seconds / done,
                    "data_wait_ms": 1e3 * self._data_wait / done, "device_wait_ms": 1e3 * self._device_wait / done,
                    **train,
                }  # fmt: skip
                self._track({f"step/{k}": v for k, v in figures.items()}, at)

    def _parts(self, seconds: float, steps: int) -> str:
        """What a step's time went into; the largest part bounds the run. On a CPU the host is the device."""
        data, device = (1e3 * t / steps for t in (self._data_wait, self._device_wait))
        if not self._on_gpu:
            return f"data {data:.0f}"
        return f"data {data:.0f}, host {max(1e3 * seconds / steps - data - device, 0):.0f}, GPU {device:.0f}"

    def _line(self, text: str) -> None:
        if not self._live:
            _logger.info(text)
        elif self._file is not None:
            # Beside a live bar, lines go to the file alone.
            self._file.emit(_logger.makeRecord(_logger.name, logging.INFO, "", 0, text, (), None))

    def _say_unwritten(self, path: Path) -> None:
        if path not in self._unwritten:
            self._unwritten.add(path)
            _logger.warning("%s cannot be written (%s): the run goes on without it", path, reason_of())

    def _each_tracker(self, action: Callable[[Tracker], None]) -> None:
        """Let each tracker do something; one that fails is said and left out from then on."""
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception:  # of three libraries, their servers and disks: no reason to lose a run
                self._trackers.remove(tracker)
                _logger.warning(
                    "the tracker %s failed (%s): the run goes on without it", type(tracker).__name__, reason_of()
                )

    def _track(self, values: dict[str, float], step: int) -> None:
        self._each_tracker(lambda tracker: tracker.scalars(values, step))

    def samples(self, images: torch.Tensor) -> None:
        """Send the run's first training batch (B, C, H, W), as the model gets it, to the trackers, once."""
        if self._samples_shown or not self._trackers:
            return
        self._samples_shown = True
        shown = picture(images, *normalisation(self._args.in_chans))
        self._each_tracker(lambda tracker: tracker.image("samples", shown, 0))

    def histograms(self, model: nn.Module, epoch: int) -> None:
        """Weights and their last gradients, with `--histograms`."""
        if not self._args.histograms:
            return

        def send(tracker: Tracker) -> None:
            for name, parameter in model.named_parameters():
                tracker.histogram(f"weights/{name}", parameter.detach(), epoch)
                if parameter.grad is not None:
                    tracker.histogram(f"gradients/{name}", parameter.grad, epoch)

        self._each_tracker(send)

    def finish(self) -> None:
        """End the pass that `start` began."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def epoch(self, record: dict[str, Any]) -> None:
        """Append one epoch's figures to the log and to the trackers.

        Args:
            record: plain values, with the epoch under "epoch".
        """
        if not self._enabled:
            return
        self._records.append(record)
        if self._folder is not None:
            try:
                with (self._folder / "log.txt").open("a") as file:
                    file.write(to_json(record) + "\n")
            except OSError:
                self._say_unwritten(self._folder / "log.txt")
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._track(numbers, record["epoch"])
        accuracy = ""
        if "test_acc1" in record:
            accuracy = "  top-1 {test_acc1:.2f} %  top-5 {test_acc5:.2f} %  best {best_acc1:.2f} %".format_map(record)
        if "ema_test_acc1" in record:
            accuracy += f"  averaged {record['ema_test_acc1']:.2f} %"
        _logger.info(
            "epoch %d/%d  loss %.4f  test loss %.4f%s  %.0f images/s",
            record["epoch"] + 1, self._args.epochs, record["train_loss"], record["test_loss"], accuracy,
            record["train_images_per_s"],
        )  # fmt: skip

    def summary(self) -> None:
        """Log a summary of the epochs of this process."""
        if not self._enabled or not self._records:
            return
        records, last = self._records, self._records[-1]
        seconds, trained, waited = (
            time.perf_counter() - self._started,
            *(sum(r[k] for r in records) for k in ("train_s", "train_data_wait_s")),
        )
        rate = sum(r["train_images_per_s"] * r["train_s"] for r in records) / max(trained, 1e-9)
        lines = [
            f"{len(records)} epochs in {timedelta(seconds=round(seconds))}: {trained:.0f} s of training at {rate:,.0f} "
            f"images/s, {waited:.0f} s of them waiting for data",
        ]
        if "test_acc1" in last:
            lines.append(f"top-1 {last['test_acc1']:.2f} % at the end, best {last['best_acc1']:.2f} %")
        else:
            lines.append(f"test loss {last['test_loss']:.4f} at the end, best {last['best_loss']:.4f}")
        if "ema_test_acc1" in last:
            lines[-1] += f", averaged weights {last['ema_test_acc1']:.2f} %"
        lines.append(
            f"{last['train_memory_mib']:,.0f} MiB of memory, {last['skipped_updates']} updates skipped, "
            f"{last['bad_images']} bad images"
        )
        if self._folder is not None:
            lines.append(f"checkpoints and log in {self._folder}")
        for line in lines:
            _logger.info("done: %s", line)

    def close(self) -> None:
        """End the pass and close the files."""
        self.finish()
        if self._profiler is not None:
            self._profiler.close()
        self._each_tracker(lambda tracker: tracker.close())
        if self._file is not None:
            _logger.removeHandler(self._file)
            self._file.close()
