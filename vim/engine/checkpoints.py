"""Run checkpoints: one atomic file with all that a run needs to go on bit for bit.

Random numbers need no state: those of a step are seeded from (seed, epoch, step, rank), those of a sample from (seed,
epoch, position), so the counters in the file say them all.
"""

import os
from pathlib import Path
from typing import Any

import torch

from vim.errors import UserError
from vim.models.checkpoint import CheckpointError, load_checkpoint

FORMAT_VERSION = 1


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(source: str, output_dir: str) -> dict[str, Any] | None:
    """The checkpoint that `--resume` names; for "auto" the output folder's last, or None if there is none yet.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    if source == "auto":
        if not output_dir:
            raise UserError("--resume auto looks into --output-dir: pass that too")
        path = Path(output_dir) / "checkpoint.pth"
        if not path.exists():
            return None
        source = str(path)
    try:
        return load_checkpoint(source)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def is_own(checkpoint: dict[str, Any]) -> bool:
    """Whether this project's training wrote the checkpoint.

    Raises:
        UserError: a newer version of the project wrote it.
    """
    version = checkpoint.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has format version {version}, this version of the project reads up to {FORMAT_VERSION}: "
            "update vision-mamba"
        )
    return isinstance(version, int)
