"""Reading checkpoints that nobody vouches for: tensors and plain values only, never code.

`load_checkpoint` reads a file or hub id into a plain dictionary, `extract_state_dict` finds the weights in it,
`load_into` puts them into a model.
"""

import argparse
import logging
import pickle
import socket
import urllib.parse
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn

from vim.models.transfer import fit_state_dict

if TYPE_CHECKING:
    from vim.models.vision_mamba import VisionMamba

_logger = logging.getLogger("vision_mamba")

# Published files keep their command line as a Namespace; it holds plain values and runs nothing when unpickled.
_ALLOWED = [argparse.Namespace, OrderedDict]
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_EMA_KEYS = ("model_ema", "state_dict_ema")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence fit for users."""


def load_checkpoint(source: str | Path) -> dict[str, Any]:
    """Content of a checkpoint: `.pth`/`.pt`, `.safetensors`, or `hf-hub:owner/repository[/file]`.

    Raises:
        CheckpointError: missing, truncated, not a checkpoint, holding code to execute, or not downloadable.
    """
    path = _from_hub(str(source)) if str(source).startswith("hf-hub:") else Path(source)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: give the path of a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # the library raises its own type beside OSError
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() and _looks_like_pickle(path):
            raise CheckpointError(
                f"{path} holds more than tensors and plain values, which could run code when read, so it was refused: "
                "save its state_dict alone (torch.save(model.state_dict(), ...)) or as .safetensors"
            ) from error
        raise CheckpointError(f"{path} is not a checkpoint that torch.save or safetensors wrote") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint: copy it again or give another file ({_first_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary with a state dict")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _looks_like_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def _from_hub(source: str) -> Path:
    import huggingface_hub  # here: slow to import, and seldom needed

    owner, _, rest = source.removeprefix("hf-hub:").partition("/")
    repository, _, filename = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not owner or not repository:
        raise CheckpointError(f"{source} is no hub id: expected hf-hub:owner/repository[@revision][/file]")
    filename = filename or "model.safetensors"
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                f"{owner}/{repository}", filename, revision=revision or None, local_files_only=not _hub_has_address()
            )
        )
    except Exception as error:  # network, authorisation and cache errors of three libraries
        raise CheckpointError(
            f"{filename} of {owner}/{repository} could not be downloaded ({type(error).__name__}): get it on a machine "
            "with a network and give its path instead, or name another file with hf-hub:owner/repository/file"
        ) from error


def _hub_has_address() -> bool:
    """False where the hub's name has no address: its client would try for most of a minute, and say so on each try."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def has_ema(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds averaged weights beside the model's."""
    return any(isinstance(checkpoint.get(key), dict) and checkpoint[key] for key in _EMA_KEYS)


def extract_state_dict(checkpoint: dict[str, Any], *, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: under "model" (or "model_ema", "state_dict"), or the dictionary itself.

    Prefixes that wrappers leave on every name ("module.", "_orig_mod.") are taken off.

    Raises:
        CheckpointError: no tensors there, or EMA weights asked for that it does not hold.
    """
    keys = _EMA_KEYS if use_ema else ("model", "state_dict")
    state = next((checkpoint[k] for k in keys if isinstance(checkpoint.get(k), dict)), None)
    if state is None:
        if use_ema:
            raise CheckpointError("the checkpoint holds no EMA weights (model_ema): evaluate it without EMA")
        state = checkpoint
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise CheckpointError(f"the checkpoint holds no weights, only {', '.join(map(str, checkpoint)) or 'nothing'}")
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in state)), ""):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: "VisionMamba", *, grid: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """Published and own checkpoints → this model's state dict: unwrapped, and resampled to the model's patch grid.

    Args:
        state_dict: a checkpoint or a state dict.
        model: for which.
        grid: rows and columns that the checkpoint's position embedding stands for; None means a square.

    Raises:
        CheckpointError: it holds no weights.
        ValueError: a position embedding of no such grid.
    """
    return fit_state_dict(extract_state_dict(state_dict), model, grid=grid)


def load_into(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    *,
    strict: bool = True,
    reset_head: bool = True,
    grid: tuple[int, int] | None = None,
) -> list[str]:
    """Load weights into a model, resampling position embeddings to the model's grid.

    Args:
        model: a VisionMamba, or any model whose names fit.
        state_dict: from `extract_state_dict`.
        strict: missing or unexpected names are an error, else a notice.
        reset_head: a head of another number of classes is left at its initialisation, with a notice, else an error.
        grid: rows and columns that the position embedding stands for; None means a square.

    Returns:
        The names that were left at their initialisation or ignored.

    Raises:
        CheckpointError: names or shapes that differ, listed.
    """
    state = dict(state_dict)
    own = model.state_dict()
    if hasattr(model, "token_layout"):
        try:
            state = fit_state_dict(state, model, grid=grid)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's position embedding does not fit the model: {error}") from error
    left_out = []
    if reset_head:
        left_out = sorted(
            n for n, t in state.items() if n.startswith("head.") and (n not in own or own[n].shape != t.shape)
        )
        for name in left_out:
            _logger.warning(
                "%s has shape %s in the checkpoint and %s in the model: it is left out",
                name, tuple(state.pop(name).shape), tuple(own[name].shape) if name in own else "none",
            )  # fmt: skip
    missing = sorted(set(own) - set(state) - set(left_out))
    unexpected = sorted(set(state) - set(own))
    shapes = sorted(n for n in set(own) & set(state) if own[n].shape != state[n].shape)
    problems = []
    if shapes:
        listed = [f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}" for n in shapes]
        problems.append("other shapes: " + _some(listed))
    if missing:
        problems.append("missing: " + _some(missing))
    if unexpected:
        problems.append("unexpected: " + _some(unexpected))
    if shapes or (problems and strict):
        raise CheckpointError(
            f"the checkpoint is of another model than {type(model).__name__} as built here ({'; '.join(problems)})"
        )
    if problems:
        _logger.warning("loading weights: %s", "; ".join(problems))
    model.load_state_dict(state, strict=False)
    return left_out + missing + unexpected


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
