"""The OpenMMLab packages: checks that they are complete, and lets current PyTorch read their checkpoints."""

import importlib
import warnings

import torch

from vim.dense import operators
from vim.errors import UserError
from vim.models.unpickling import DATA_TYPES

INSTALL = "bash scripts/install_openmmlab.sh"


def require_stack(*packages: str) -> None:
    """Import mmengine, mmcv with its operators and `packages`, and make mmengine's checkpoints readable.

    Where mmcv has no compiled operators, those of torchvision stand in for them (`vim.dense.operators`).

    Raises:
        UserError: one is missing, of a version the others refuse, or compiled for another PyTorch.
    """
    # mmcv imports pkg_resources, which announces its own end; mmdet does so on every import of its registry.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)
    for package in ("mmengine", "mmcv", *packages):
        try:
            importlib.import_module(package)
            if package == "mmcv":
                operators.serve()
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: run {INSTALL}") from error
        except (ImportError, AssertionError) as error:
            raise UserError(f"{package} cannot be imported ({error}): run {INSTALL}") from error
    try:
        importlib.import_module("mmcv.ops")
    except (ImportError, AssertionError) as error:
        raise UserError(
            "mmcv's operators cannot be imported: it is incomplete or was compiled for another PyTorch "
            f"({_first_line(error)}): run {INSTALL}"
        ) from error
    _allow_runner_checkpoints()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _allow_runner_checkpoints() -> None:
    """Let `torch.load(weights_only=True)` read what mmengine's Runner saves beside the weights: logged histories.

    These types hold numbers and strings and run nothing when unpickled, so a checkpoint stays as harmless as one of
    bare tensors; anything beyond them is still refused.
    """
    from mmengine.logging import HistoryBuffer

    # Each history carries references to its class's methods, which only `getattr` could rebuild, and a checkpoint that
    # may use it can call anything. They are left out of what is saved; the class has them anyway.
    HistoryBuffer.__getstate__ = lambda self: {k: v for k, v in vars(self).items() if k != "_statistics_methods"}
    # Not numpy's own constructors: `load_checkpoint` has stand-ins, and of two for one name torch takes either.
    torch.serialization.add_safe_globals([HistoryBuffer, *DATA_TYPES])
