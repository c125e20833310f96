"""Fitting the weights of one model to another: position embeddings to the patch grid, names that differ."""

import logging
from typing import TYPE_CHECKING

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
        grid: rows and columns that the position embedding stands for; None means a guess, which the log says: the
            model's own if it has as many patches, else a square.

    Raises:
        ValueError: a position embedding of no such grid.
    """
    state_dict = dict(state_dict)
    pos_embed, own_grid = state_dict.get("pos_embed"), model.patch_embed.grid_size
    if pos_embed is not None and model.pos_embed is not None:
        if grid or pos_embed.shape != model.pos_embed.shape:
            state_dict["pos_embed"] = resample_pos_embed(
                pos_embed, own_grid, class_token=model.class_rows, old_grid=grid
            )
        elif own_grid[0] != own_grid[1]:
            _logger.warning(
                "the position embedding does not say which grid its patches form: taken for the model's %d × %d",
                *own_grid,
            )
    if model.rope is not None:
        # Rotary tables follow from the grid; those of the file may stand for another one.
        state_dict["rope.freqs_cos"], state_dict["rope.freqs_sin"] = model.rope.freqs_cos, model.rope.freqs_sin
    return state_dict
