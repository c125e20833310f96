"""Run checkpoints: one atomic file with everything that a run needs to continue bit for bit.

Random numbers need no state: those of a step are seeded from (seed, epoch, step, rank), those of a sample from (seed,
epoch, position), so the counters in the file determine them all.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vim.engine.distributed import DistributedContext
from vim.engine.state import TrainState
from vim.errors import UserError
from vim.flags import Flags, parse_interval
from vim.models.checkpoint import CheckpointError, extract_state_dict, has_ema, load_checkpoint

_logger = logging.getLogger("vision_mamba")

FORMAT_VERSION = 2
LAST, PREVIOUS, BEST = "checkpoint.pth", "previous_checkpoint.pth", "best_checkpoint.pth"
_EVERY = "checkpoint_*.pth"
_TEMPORARY = ".tmp"
_COUNT, _NUMBER = (int,), (int, float)
_ENTRIES: dict[str, tuple[type, ...]] = {
    "model": (dict,), "optimizer": (dict,), "lr_scheduler": (dict,), "args": (dict,), "epoch": _COUNT, "step": _COUNT,
    "world_size": _COUNT, "skipped": _COUNT, "updates": _COUNT, "best": _NUMBER, "loss_sum": _NUMBER,
    "norm_sum": _NUMBER, "model_ema": (type(None), dict), "scaler": (type(None), dict),
}  # fmt: skip


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then rename it: `path` holds the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # Where both were links to one file, nothing was renamed.
        temporary.unlink(missing_ok=True)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    # The rename itself must reach the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, whatever happens in between."""
    _write_atomically(path, lambda temporary: torch.save({"format_version": FORMAT_VERSION, **content}, temporary))


class CheckpointManager:
    """Writes a run's checkpoints into its folder: the last two, the best, and that of every N-th epoch.

    Files that a killed process left half-written are removed.

    Args:
        folder: of the run; None writes nothing.
        args: parsed flags.
        context: of this process.
        classes: names of the classes, by number, if known.
    """

    def __init__(
        self, folder: Path | None, args: Flags, context: DistributedContext, classes: list[str] | None = None
    ) -> None:
        self.folder, self.args, self.context, self.classes = folder, args, context, classes
        if folder is not None and context.is_main:
            for leftover in folder.glob(f".*.pth{_TEMPORARY}"):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)
        self._steps, self._seconds = parse_interval(args.checkpoint_interval)
        self._saved_at = time.monotonic()
        self._since = 0

    def due(self, steps: int) -> bool:
        """Whether `--checkpoint-interval` asks for a checkpoint after `steps` more steps."""
        self._since += steps
        if self._steps and self._since >= self._steps:
            return True
        return bool(self._seconds) and time.monotonic() - self._saved_at >= self._seconds

    def save(self, state: TrainState, name: str = LAST, *, copies: tuple[str, ...] = (), **extra: Any) -> Path | None:
        """Write the copies, then `name`; every process calls this, the main one writes.

        Args:
            state: what to save.
            name: of the file.
            copies: names of further files with the same content.
            extra: further entries.
        """
        self._saved_at, self._since = time.monotonic(), 0
        if self.folder is None or not (self.context.is_main or self.args.fsdp):
            return None
        content = state.content(fsdp=self.args.fsdp)
        if not self.context.is_main:
            return None
        path = self.folder / name
        grid = getattr(getattr(state.model, "patch_embed", None), "grid_size", None)
        content |= {
            "args": vars(self.args), "world_size": self.context.world_size, "classes": self.classes,
            # Grid of the position embedding: rows and columns.
            "grid": None if grid is None else tuple(grid), **extra,
        }  # fmt: skip
        try:
            first, *others = [self.folder / target for target in (*copies, name)]
            # `name` comes last: a run killed in between repeats the step, and with it the copies.
            for target in (first, *others):
                if target.name == LAST and target.exists():
                    _write_atomically(self.folder / PREVIOUS, lambda temporary: _link(path, temporary))
                if target is first:
                    save_atomically(content, first)
                else:
                    _write_atomically(target, lambda temporary: shutil.copyfile(first, temporary))
        except (OSError, RuntimeError) as error:  # RuntimeError: of torch's archive writer, on a full disk
            reason = getattr(error, "strerror", None)
            if reason is None:
                gone = not self.folder.is_dir()
                reason = "its folder is gone" if gone else "the disk is full, or the file too large for it"
            raise UserError(
                f"{path} cannot be written ({reason}): the checkpoint before it is kept; make room or mend the "
                "folder, then continue with --resume auto"
            ) from error
        return path

    def save_epoch(self, state: TrainState, *, improved: bool) -> None:
        """Write the last checkpoint after an epoch, and copies of it if it is the best or if this epoch's is kept."""
        every = self.args.keep_every_epochs
        copies = (BEST,) if improved else ()
        if every and state.epoch % every == 0:
            copies += (_EVERY.replace("*", f"{state.epoch:04d}"),)
        self.save(state, copies=copies)


def _link(source: Path, target: Path) -> None:
    # A link costs no space and the source is only ever replaced; some file systems have none.
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_entries(checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of this project that lacks an entry, or has one of another type.

    Raises:
        CheckpointError: see above.
    """
    if missing := sorted(set(_ENTRIES) - set(checkpoint)):
        raise CheckpointError(f"it lacks {', '.join(missing)}")
    for name, types in _ENTRIES.items():
        if not isinstance(value := checkpoint[name], types) or isinstance(value, bool):
            raise CheckpointError(f"its {name} is a {type(value).__name__}, expected a {types[-1].__name__}")
        if types is _COUNT and value < (name == "world_size"):
            raise CheckpointError(f"its {name} is {value}")
    extract_state_dict(checkpoint)
    if has_ema(checkpoint):
        extract_state_dict(checkpoint, use_ema=True)


def _read_own(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    try:
        if "format_version" not in checkpoint:
            raise CheckpointError("no run of this project wrote it")
        _check_entries(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be continued: {error}") from error
    return checkpoint


def read(source: str, output_dir: str) -> dict[str, Any] | None:
    """The checkpoint that `--resume` names.

    For "auto" it is the newest good one of the output folder: a damaged one is skipped with a warning. None if
    there are none yet.

    Raises:
        UserError: the checkpoint cannot be used, or none of the output folder's can.
    """
    try:
        if source != "auto":
            return load_checkpoint(source)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if not output_dir:
        raise UserError("--resume auto looks into --output-dir: pass that too")
    folder = Path(output_dir)
    paths = [p for name in (LAST, PREVIOUS, BEST) if (p := folder / name).is_file()] + list(folder.glob(_EVERY))
    paths.sort(key=lambda p: (p.name != LAST, -p.stat().st_mtime_ns))
    for path in paths:
        try:
            checkpoint = _read_own(path)
        except CheckpointError as error:
            _logger.warning("%s; trying the one before it", error)
            continue
        _logger.info("resuming from %s, epoch %d, step %d", path, checkpoint["epoch"], checkpoint["step"])
        return checkpoint
    if paths:
        raise UserError(f"none of the checkpoints in {folder} can be read: remove them to start afresh")
    return None


def is_own(checkpoint: dict[str, Any]) -> bool:
    """Whether this project's training wrote the checkpoint.

    Raises:
        UserError: another version of the project wrote it, or it lacks what a run needs.
    """
    version = checkpoint.get("format_version")
    if version is not None and version != FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has format version {str(version)[:20]}, this version of the project reads "
            f"{FORMAT_VERSION}: use the version of vision-mamba that wrote it, or start from its weights by --finetune"
        )
    if version is None:
        return False
    try:
        _check_entries(checkpoint)
    except CheckpointError as error:
        raise UserError(f"the checkpoint cannot be used, {error}") from error
    return True
