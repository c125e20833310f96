"""`--profile N`: a trace and a table of N training steps by torch's profiler."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_logger = logging.getLogger("vision_mamba")

_SKIPPED = 5  # steps that choose kernels, fill caches and capture graphs


class StepProfiler:
    """Profiles some steps of a run, after the first few, and writes `trace.json.gz` and `table.txt`.

    Args:
        steps: how many.
        folder: for the files, made when they are written.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self._folder, self._written = folder, False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(
            activities=activities, schedule=schedule(wait=_SKIPPED - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write, record_shapes=True,
        )  # fmt: skip
        self._profile.start()

    def step(self) -> None:
        """Say that a training step has ended."""
        if not self._written:
            self._profile.step()

    def close(self) -> None:
        """End profiling; what an unfinished run gathered is written."""
        if not self._written:
            self._profile.stop()
            if not self._written:
                _logger.warning("--profile: the run ended within its first %d steps, which are left out", _SKIPPED)

    def _write(self, profiled: profile) -> None:
        self._written = True
        self._folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self._folder / "trace.json.gz"))
        device = "cuda" if ProfilerActivity.CUDA in profiled.activities else "cpu"
        table = profiled.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40)
        (self._folder / "table.txt").write_text(table, encoding="utf-8")
        _logger.info(
            "profile: %s says what takes the time; ui.perfetto.dev shows trace.json.gz", self._folder / "table.txt"
        )
