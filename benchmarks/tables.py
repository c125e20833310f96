"""CSV files of measurements, which grow row by row, and the name of the machine that they come from."""

import csv
import platform
from pathlib import Path

import torch


def device_name(device: str) -> str:
    """Of the GPU or the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Add whole cases at a time, so that a run that is stopped leaves no part of one."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
