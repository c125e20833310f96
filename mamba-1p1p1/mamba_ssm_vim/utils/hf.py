"""Configurations and weights of language models, from a folder or a hub id, without running code from them."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mamba_ssm_vim.utils.files import CheckpointError, check_archive, first_line, has_address

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "pytorch_model.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model_name: a folder, or a hub id `owner/repository`.

    Raises:
        ValueError: nothing there, not downloadable, or not JSON.
    """
    path = _find(model_name, [CONFIG_NAME])
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def load_state_dict_hf(
    model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The weights: `model.safetensors`, in one file or several with an index, else `pytorch_model.bin`.

    Only tensors are read. A pickle that holds anything else is refused, and so is an archive with wrong checksums.

    Args:
        model_name: a folder, or a hub id `owner/repository`.
        device: where to put the tensors.
        dtype: what to convert them to; None keeps theirs.

    Raises:
        ValueError: nothing there, not downloadable, damaged, or holding more than tensors.
    """
    path = _find(model_name, [SAFE_WEIGHTS_NAME, WEIGHTS_NAME, INDEX_NAME])
    if path.name == INDEX_NAME:
        state = {}
        for name in _parts(path):
            state |= _read(_find(model_name, [name]))
    else:
        state = _read(path)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}


def save_state_dict(state: dict[str, torch.Tensor], folder: Path, *, safe: bool) -> None:
    """Write weights into a folder as `model.safetensors`, or if not `safe` as `pytorch_model.bin`."""
    if safe:
        import safetensors.torch  # here: only language models need it

        state = {name: tensor.contiguous() for name, tensor in state.items()}
        safetensors.torch.save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        torch.save(state, folder / WEIGHTS_NAME)


def _find(model_name: str | Path, names: list[str]) -> Path:
    """The first of these files that the folder or hub repository has."""
    folder = Path(model_name)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"{folder} holds none of {', '.join(names)}: give a folder with a saved model")
    if folder.is_absolute() or str(model_name).count("/") != 1 or str(model_name).startswith("."):
        raise ValueError(f"{model_name} is no folder, and no hub id of the form owner/repository")
    return _download(str(model_name), names)


def _download(repository: str, names: list[str]) -> Path:
    import huggingface_hub  # here: slow to import, and seldom needed
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    offline, problem = not has_address(huggingface_hub.constants.ENDPOINT), None
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=offline))
        except LocalEntryNotFoundError as error:
            problem = error
        except EntryNotFoundError as error:
            problem = error
        except Exception as error:  # network, authorisation and cache errors of three libraries
            problem = error
            break
    raise ValueError(
        f"{' or '.join(names)} of {repository} could not be downloaded ({type(problem).__name__}): get the "
        "repository on a machine with a network and give the path of its folder instead"
    ) from problem


def _parts(index: Path) -> list[str]:
    """Names of the files that an index says hold the weights."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("its files must lie beside it")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of weights: {error}") from error
    return names


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch  # here: only language models need it

            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):  # else it is of torch before release 1.6, or damaged
            check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, which could run code when read, or is damaged, so it was refused: "
            "save its state dict alone or as model.safetensors"
        ) from error
    except Exception as error:  # torch, zipfile and safetensors raise errors of many types
        raise CheckpointError(f"{path} is truncated or damaged: copy it again ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(f"{path} holds no state dict: save the model's state_dict() alone")
    return state
