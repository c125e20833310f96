"""Reads untrusted checkpoints, and fits their weights to a model.

`load_checkpoint` reads a file or hub id into a plain dictionary, without running code that it may hold.
`extract_state_dict` finds the weights in that dictionary, `load_into` loads them into a model.
"""

import logging
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from mamba_ssm_vim.utils.files import CheckpointError, check_archive, first_line, has_address
from timm.models import adapt_input_conv
from torch import nn

from vim.models.transfer import fit_state_dict
from vim.models.unpickling import DATA_TYPES

if TYPE_CHECKING:
    from vim.models.vision_mamba import VisionMamba

_logger = logging.getLogger("vision_mamba")

_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
_MODEL_KEYS = ("model", "state_dict", "model_state_dict")
_EMA_KEYS = ("model_ema", "state_dict_ema")
# First bytes of torch.save's format before version 1.6.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def load_checkpoint(source: str | Path) -> dict[str, Any]:
    """Content of a checkpoint: `.pth`/`.pt`, `.safetensors`, or `hf-hub:owner/repository[/file]`.

    Tensors, Python's plain types, `argparse.Namespace`, numpy scalars and arrays, paths and devices are data. Every
    part of a file that torch.save wrote is compared with its checksum.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, holding code to execute, or not downloadable.
    """
    path = _from_hub(str(source)) if str(source).startswith("hf-hub:") else Path(source)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: give the path of a .pth or .safetensors file")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary with a state dict")
    return content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the library raises its own type beside OSError
        raise CheckpointError(f"{path} is not a complete safetensors file: {first_line(error)}") from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    if start.startswith(b"PK\x03\x04"):
        check_archive(path)
    elif start.startswith(b"\x80") and start != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is a bare pickle, which could run code when read: write it with torch.save")
    elif start != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is not a checkpoint that torch.save or safetensors wrote: give another file")
    try:
        # Leaving the context takes away all that it was given, also what others had allowed for the whole process.
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([kind for kind in DATA_TYPES if kind not in allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any error of the allowed types' constructors, called by an untrusted pickle
        if refused := re.search(r"GLOBAL (\S{1,100})", str(error)):
            raise CheckpointError(
                f"{path} holds {refused[1]}, which is no plain value and could run code when read, so it was refused: "
                "save its state_dict alone (torch.save(model.state_dict(), ...)) or as .safetensors"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(f"{path} does not hold plain values alone: {_reason(error)}") from error
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint: copy it again or give another file ({first_line(error)})"
        ) from error


def _reason(error: pickle.UnpicklingError) -> str:
    """What the unpickler refused, without torch's advice on how to allow it."""
    return str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0].split(". ")[0][:200]


def _from_hub(source: str) -> Path:
    import huggingface_hub  # slow to import, and seldom needed

    owner, _, rest = source.removeprefix("hf-hub:").partition("/")
    repository, _, filename = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not owner or not repository:
        raise CheckpointError(f"{source} is no hub id: expected hf-hub:owner/repository[@revision][/file]")
    filename = filename or "model.safetensors"
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                f"{owner}/{repository}",
                filename,
                revision=revision or None,
                local_files_only=not has_address(huggingface_hub.constants.ENDPOINT),
            )
        )
    except Exception as error:  # network, authorisation and cache errors of three libraries
        raise CheckpointError(
            f"{filename} of {owner}/{repository} could not be downloaded ({type(error).__name__}): get it on a machine "
            "with a network and give its path instead, or name another file with hf-hub:owner/repository/file"
        ) from error


def has_ema(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds averaged weights beside the model's."""
    return any(isinstance(checkpoint.get(key), dict) and checkpoint[key] for key in _EMA_KEYS)


def extract_state_dict(checkpoint: dict[str, Any], *, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: under "model", "state_dict", "model_state_dict", or the dictionary itself.

    Averaged weights lie under "model_ema" or "state_dict_ema"; they also serve where there are no others. Prefixes that
    wrappers leave on names ("module.", "model.", "net.", "backbone.") are taken off. Names outside of the prefix, such
    as a loss's, are left out with a notice.

    Raises:
        CheckpointError: no usable tensors there, or the EMA weights that were requested are missing.
    """
    keys = _EMA_KEYS if use_ema else (*_MODEL_KEYS, *_EMA_KEYS)
    key = next((k for k in keys if isinstance(checkpoint.get(k), dict)), None)
    if key is None and use_ema:
        raise CheckpointError("the checkpoint holds no EMA weights (model_ema): evaluate it without EMA")
    if key in _EMA_KEYS and not use_ema:
        _logger.warning("the checkpoint holds averaged weights alone (%s): they are used", key)
    state = checkpoint if key is None else checkpoint[key]
    state = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not state:
        raise CheckpointError(f"the checkpoint holds no weights, only {_some([str(k)[:40] for k in checkpoint])}")
    state = _without_prefix(state)
    for name, tensor in state.items():
        _check_tensor(name, tensor)
    return state


def _without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's names: below the wrappers' prefix of the patch embedding, or else of all names."""
    stem = "patch_embed.proj.weight"
    wrapped = rf"((?:{'|'.join(map(re.escape, _WRAPPERS))})*)"
    if prefixes := [m[1] for name in state if (m := re.fullmatch(wrapped + re.escape(stem), name))]:
        prefix = min(prefixes, key=len)
    else:
        prefix = min((re.match(wrapped, name)[1] for name in state), key=len)
        if not all(name.startswith(prefix) for name in state):
            prefix = ""
    if others := [name for name in state if not name.startswith(prefix)]:
        _logger.warning("the model's weights begin with %r: %s left out", prefix, _some(others))
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Refuse weights that no model has.

    Raises:
        CheckpointError: a layout other than a dense one with a value in memory for each element, or NaN or infinity.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise CheckpointError(
            f"{name} is a {kind} tensor, expected a dense one: save the state dict of the plain model"
        )
    # A tensor with a stride of 0 can describe more memory than any machine has.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} {tuple(tensor.shape)} is an expanded tensor: save it after .contiguous()")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
        return
    # An attention mask, as ARM's pretraining keeps with its weights, is -inf where there is nothing to see.
    finite = tensor.isfinite() | tensor.isneginf() if name.rpartition(".")[2] == "mask" else tensor.isfinite()
    if not finite.all():
        raise CheckpointError(
            f"{name} holds {int((~finite).sum())} values that are not finite (NaN or infinity): the run that wrote it "
            "had diverged, so use an earlier checkpoint"
        )


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: "VisionMamba", *, grid: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """Published and own checkpoints → this model's state dict: unwrapped, and resampled to the model's patch grid.

    Args:
        state_dict: a checkpoint or a state dict.
        model: for which.
        grid: rows and columns of the checkpoint's position embedding. None: those stored with the
            checkpoint, or else a guess, which is logged.

    Raises:
        CheckpointError: it holds no weights.
        ValueError: a position embedding of no such grid.
    """
    return fit_state_dict(extract_state_dict(state_dict), model, grid=grid or stored_grid(state_dict))


def stored_grid(checkpoint: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the position embedding, if the checkpoint states them."""
    grid = checkpoint.get("grid")
    if isinstance(grid, tuple | list) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid):
        return grid[0], grid[1]
    return None


def load_into(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    *,
    strict: bool = True,
    reset_head: bool = True,
    grid: tuple[int, int] | None = None,
) -> list[str]:
    """Load weights into a model: position embeddings resampled to its grid, a colour filter summed for grey images.

    Args:
        model: a VisionMamba, or any model whose names fit.
        state_dict: from `extract_state_dict`.
        strict: missing or unexpected names are an error, else a notice.
        reset_head: a head of another number of classes is left at its initialisation, with a notice, else an error.
        grid: rows and columns of the position embedding, from `stored_grid`; None: see
            `checkpoint_filter_fn`.

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
    _adapt_first_conv(state, model, own)
    left_out = []
    if reset_head:
        # Mamba-R's registers belong to its head, which reads each of them.
        registers = ("neck.", "norm_neck.", "cls_token", "pos_embed_cls") if "pos_embed_cls" in own else ()
        heads = ("head.", *registers)
        left_out = sorted(
            n for n, t in state.items() if n.startswith(heads) and (n not in own or own[n].shape != t.shape)
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
        raise CheckpointError(f"the checkpoint does not fit this {type(model).__name__} ({'; '.join(problems)})")
    if problems:
        _logger.warning("loading weights: %s", "; ".join(problems))
    model.load_state_dict(state, strict=False)
    return left_out + missing + unexpected


def _adapt_first_conv(state: dict[str, torch.Tensor], model: nn.Module, own: dict[str, torch.Tensor]) -> None:
    """Fit the first filter to the model's channels as timm does: summed for one, repeated and scaled for others."""
    name = f"{(getattr(model, 'pretrained_cfg', None) or {}).get('first_conv')}.weight"
    weight, channels = state.get(name), own[name].shape[1] if name in own else 0
    if weight is None or weight.ndim != 4 or channels in (0, weight.shape[1]):
        return
    try:
        state[name] = adapt_input_conv(channels, weight)
    except NotImplementedError:  # not a colour filter: the shapes are reported below
        return
    _logger.warning("%s of %d channels is converted to the model's %d", name, weight.shape[1], channels)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
