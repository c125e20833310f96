"""Fitting the weights of one model to another: position embeddings to the patch grid, names that differ."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from vim.models.pos_embed import resample_pos_embed

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
        grid: rows and columns that the position embedding stands for; None means those of the image size in timm's
            configuration of the weights, else a square, which the log says.

    Raises:
        ValueError: a position embedding of no such grid.
    """
    state_dict = dict(state_dict)
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is not None and model.pos_embed is not None and (grid or pos_embed.shape != model.pos_embed.shape):
        state_dict["pos_embed"] = resample_pos_embed(
            pos_embed,
            model.patch_embed.grid_size,
            class_token=model.class_token,
            old_grid=grid or _configured_grid(model, pos_embed.shape[1]),
        )
    if model.rope is not None:
        # Rotary tables follow from the grid; those of the file may stand for another one.
        state_dict["rope.freqs_cos"], state_dict["rope.freqs_sin"] = model.rope.freqs_cos, model.rope.freqs_sin
    return state_dict


def _configured_grid(model: "VisionMamba", rows: int) -> tuple[int, int] | None:
    """The grid of the image size that timm's configuration of the weights names, if it accounts for every row."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    height, width = config.get("input_size", (3, 0, 0))[-2:]
    grid = model.patch_embed.dynamic_feat_size((height, width))
    return grid if grid[0] * grid[1] + model.num_prefix_tokens == rows else None
