"""Fitting the weights of one model to another: position embeddings to the patch grid, names that differ."""

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vim.models.layout import join_tokens, token_layout
from vim.models.pos_embed import resample_frames, resample_pos_embed

if TYPE_CHECKING:
    from vim.models.vision_mamba import VisionMamba

_logger = logging.getLogger("vision_mamba")


def fit_state_dict(
    state_dict: dict[str, torch.Tensor], model: "VisionMamba", *, grid: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """A state dict of this or a related architecture → this model's, resampled to the model's patch grid.

    Args:
        state_dict: names and tensors.
        model: for which.
        grid: rows and columns of the position embedding; None means a guess, which is logged: the
            model's own if it has as many patches, else a square.

    Raises:
        ValueError: a position embedding of no such grid.
    """
    state_dict = dict(state_dict)
    if "enc2dec.weight" in state_dict:
        state_dict = _from_arm_pretraining(state_dict, model)
    elif "patch_embed.proj.weight" in state_dict and model.num_frames:
        state_dict = _to_clips(state_dict, model)
    pos_embed, own_grid = state_dict.get("pos_embed"), model.patch_embed.grid_size
    if pos_embed is not None and model.pos_embed is not None:
        if grid or pos_embed.shape != model.pos_embed.shape:
            state_dict["pos_embed"] = resample_pos_embed(
                pos_embed,
                own_grid,
                class_token=model.class_rows,
                old_grid=grid,
                antialias=model.pos_embed_antialias,
            )
        elif own_grid[0] != own_grid[1]:
            _logger.warning(
                "the position embedding does not say which grid its patches form: taken for the model's %d × %d",
                *own_grid,
            )
    if model.rope is not None:
        # Rotary tables follow from the grid; those of the file may belong to another one.
        state_dict["rope.freqs_cos"], state_dict["rope.freqs_sin"] = model.rope.freqs_cos, model.rope.freqs_sin
    return state_dict


def _from_arm_pretraining(state: dict[str, torch.Tensor], model: "VisionMamba") -> dict[str, torch.Tensor]:
    """ARM's pretrained encoder for its classifier: each scan starts as the forward one, the class token at position 0.

    What the pretraining lacks (class token, final norm, head) stays as it is in the model; its decoder is dropped.
    """
    own, fitted = model.state_dict(), {}
    for name, tensor in state.items():
        for suffix in ("", "_b", "_c", "_c_b"):
            copy = re.sub(r"\.(A)_log$|\.(D|conv1d|x_proj|dt_proj)(?=\.|$)", _with_suffix(suffix), name)
            if copy in own and not copy.startswith(("head.", "norm_f.")):
                fitted[copy] = tensor
    if "pos_embed" in state and model.pos_embed is not None:
        patches = resample_pos_embed(
            state["pos_embed"], model.patch_embed.grid_size, class_token="none", antialias=model.pos_embed_antialias
        )
        layout = token_layout(model.class_rows, 0, model.patch_embed.grid_size, 1)
        zeros = patches.new_zeros(1, len(layout.positions), patches.shape[2])
        fitted["pos_embed"] = join_tokens(zeros, patches, layout)
    kept = {name: tensor for name, tensor in own.items() if name not in fitted}
    _logger.warning("weights of ARM's pretraining: %s stay as the model has them", ", ".join(sorted(kept)))
    return fitted | kept


def _with_suffix(suffix: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f".A{suffix}_log" if match[1] else f".{match[2]}{suffix}"


def _to_clips(state: dict[str, torch.Tensor], model: "VisionMamba") -> dict[str, torch.Tensor]:
    """Weights of images, or of clips of another length, for a model of clips.

    A filter of images becomes the middle frame of the tubelet's, the others are 0; the head of an image model is left
    out, the temporal position embedding resampled or left as the model has it.
    """
    weight = state["patch_embed.proj.weight"]
    if weight.dim() == 4:
        inflated = weight.new_zeros(*weight.shape[:2], model.patch_embed.tubelet, *weight.shape[2:])
        inflated[:, :, model.patch_embed.tubelet // 2] = weight
        state["patch_embed.proj.weight"] = inflated
        _logger.warning("weights of an image model: its filters become the middle frame's, its head is left out")
        state |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    if model.temporal_pos_embedding is not None:
        frames = model.temporal_pos_embedding.shape[1]
        times = state.get("temporal_pos_embedding", model.temporal_pos_embedding.detach())
        state["temporal_pos_embedding"] = resample_frames(times, frames)
    return state
