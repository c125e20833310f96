"""Feature maps of a registered Vim model, in plain PyTorch: what every dense model starts from."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import nn
from torch.nn import functional as F

from vim.models import VisionMamba, extract_state_dict, load_checkpoint, load_into
from vim.models.pos_embed import resample_pos_embed
from vim.models.registry import check_tag

_logger = logging.getLogger("vision_mamba")
_CLASS_TOKEN_NAMES = ("cls_token", "cls_token_head", "cls_token_tail")


class VimFeatures(nn.Module):
    """Feature maps of a registered Vim model, for images of any size.

    Args:
        arch: registered model, e.g. "vim_tiny_patch16_224".
        img_size: side, or (height, width), of the training images in pixels: the grid of the position embedding. For
            images of other sizes it is resampled.
        out_indices: blocks whose maps are returned, counted from 0.
        class_token: "remove" drops it and its row of the position embedding; "keep" leaves it in the blocks. The maps
            never contain it.
        final_norm: normalise each map with the model's last norm; otherwise return the residual stream.
        grad_checkpointing: recompute blocks in the backward pass.
        model_args: further arguments of the model, e.g. if_rope=True, drop_path_rate=0.1, depth=12.

    Raises:
        ValueError: unknown arch, class_token or out_indices.
    """

    def __init__(
        self,
        arch: str,
        img_size: int | tuple[int, int],
        out_indices: Sequence[int],
        *,
        class_token: str = "remove",
        final_norm: bool = True,
        grad_checkpointing: bool = False,
        **model_args: Any,
    ) -> None:
        super().__init__()
        if not timm.is_model(arch) or not arch.startswith("vim_"):
            known = ", ".join(m for m in timm.list_models("vim_*") if "bimambav2" not in m)
            raise ValueError(f"arch is {arch!r}, expected one of {known}")
        check_tag(arch)
        if class_token not in ("keep", "remove"):
            raise ValueError(f"class_token is {class_token!r}, expected 'keep' or 'remove'")
        if class_token == "remove":
            # Without a class token the published names ask for mean pooling; there is no head to use either.
            model_args |= {"if_cls_token": False, "use_middle_cls_token": False, "use_double_cls_token": False}
        img_size = img_size if isinstance(img_size, int) else tuple(img_size)
        self.vim: VisionMamba = timm.create_model(
            arch, img_size=img_size, num_classes=0, dynamic_img_size=True, **model_args
        )
        self.out_indices = self.vim.prune_intermediate_layers(list(out_indices), prune_norm=not final_norm)
        self.vim.set_grad_checkpointing(grad_checkpointing)
        self.final_norm = final_norm

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (B, 3, H, W) → maps (B, D, rows, columns), one per entry of `out_indices`.

        Sides that the patches do not divide are padded with zeros at the right and the bottom, so that every pixel is
        seen.
        """
        embed = self.vim.patch_embed
        pad = [
            max(p - size, (p - size) % t)
            for size, p, t in zip(x.shape[2:], embed.patch_size, embed.stride, strict=True)
        ]
        if any(pad):
            x = F.pad(x, (0, pad[1], 0, pad[0]))
        maps = self.vim.forward_intermediates(
            x, indices=self.out_indices, norm=self.final_norm, stop_early=True, intermediates_only=True
        )
        return tuple(maps)

    def load_file(self, source: str, *, use_ema: bool = False) -> None:
        """Load the weights of a classification checkpoint, see `load_classifier`.

        Args:
            source: file, or "hf-hub:owner/repository/file".
            use_ema: take the averaged weights.

        Raises:
            CheckpointError: it cannot be read or is of another model.
        """
        self.load_classifier(extract_state_dict(load_checkpoint(source), use_ema=use_ema))
        _logger.info("backbone weights: %s", source)

    def load_classifier(self, state: dict[str, torch.Tensor]) -> None:
        """Load weights of a classifier, fitted to this backbone: no head, no blocks past the last one used, position
        embedding without class rows if the class token is removed and resampled to the training grid.

        Args:
            state: its state dict.

        Raises:
            CheckpointError: weights that do not fit, listed.
        """
        model = self.vim
        names = set(model.state_dict())
        state = {k: v for k, v in state.items() if not k.startswith(("head.", "rope."))}
        source_class_token = _class_token_of(state)
        if model.class_token == "none":
            state = {k: v for k, v in state.items() if k not in _CLASS_TOKEN_NAMES}
        depth = len(model.layers)
        state = {k: v for k, v in state.items() if not (k.startswith("layers.") and int(k.split(".")[1]) >= depth)}
        if not self.final_norm:
            state = {k: v for k, v in state.items() if not k.startswith("norm_f.")}
        if "pos_embed" in state and "pos_embed" not in names:
            _logger.info("the checkpoint's position embedding is left out: the model has none")
            del state["pos_embed"]
        if "pos_embed" in state:
            state["pos_embed"] = resample_pos_embed(
                state["pos_embed"].float(),
                model.patch_embed.grid_size,
                class_token=source_class_token,
                new_class_token=model.class_token,
            )
        load_into(model, state)


def _class_token_of(state: dict[str, torch.Tensor]) -> str:
    """Where the classifier that `state` belongs to has its class token. One token is in the middle: that is what all
    registered models have."""
    if "cls_token_head" in state:
        return "double"
    return "middle" if "cls_token" in state else "none"


def layer_decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], vim: VisionMamba, prefix: str, rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of a dense model, whose learning rates fall from the last block of its backbone to the first.

    Of n blocks, counted from 0, block i learns at rate^(n - i) of the full rate, the patch and position embeddings at
    rate^(n + 1), the last norm as the last block, all that is not of the backbone at the full rate. One-dimensional
    parameters, position embedding and class tokens are not decayed.

    Args:
        parameters: names and parameters of the whole model; those that need no gradient are left out.
        vim: its backbone.
        prefix: what stands before the backbone's names, such as "backbone.vim.".
        rate: above 0, up to 1.
        weight_decay: of the parameters that decay.

    Returns:
        Groups with `params`, `param_names`, `lr_scale` (as timm's schedulers read it) and `weight_decay`.

    Raises:
        ValueError: `rate` is out of range, or `vim` is no Vim model.
    """
    if not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ValueError(f"layer_decay_rate is {rate!r}, expected a number above 0 and up to 1")
    if not isinstance(vim, VisionMamba):
        raise ValueError(f"layer decay needs a Vim backbone, got {type(vim).__name__}")
    layer_of = group_parameters(vim, vim.group_matcher(), reverse=True)
    top = len(vim.layers) + 1
    no_decay = vim.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        own = name.removeprefix(prefix)
        in_backbone = own != name
        layer = layer_of[own] if in_backbone else top
        decayed = parameter.ndim > 1 and not (in_backbone and own in no_decay)
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [], "param_names": [], "lr_scale": rate ** (top - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )  # fmt: skip
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]
