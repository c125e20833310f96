"""Vim as a backbone of mmdet and mmseg: a thin adapter over `VisionMamba.forward_intermediates`."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch.nn import functional as F

from vim.models import VisionMamba, extract_state_dict, load_checkpoint, load_into
from vim.models.pos_embed import resample_pos_embed
from vim.models.registry import check_tag

_CLASS_TOKEN_NAMES = ("cls_token", "cls_token_head", "cls_token_tail")


@MODELS.register_module()
class VimBackbone(BaseModule):
    """Feature maps of a registered Vim model.

    Args:
        arch: registered model, e.g. "vim_tiny_patch16_224".
        img_size: side, or (height, width), of the training images in pixels: the grid of the position embedding. For
            images of other sizes it is resampled.
        out_indices: blocks whose maps are returned, counted from 0.
        class_token: "remove" drops it and its row of the position embedding; "keep" leaves it in the blocks. The maps
            never contain it.
        final_norm: normalise each map with the model's last norm; otherwise return the residual stream.
        grad_checkpointing: recompute blocks in the backward pass.
        init_cfg: dict(type="Pretrained", checkpoint=PATH): a classification checkpoint, published or own, as a file or
            "hf-hub:owner/repository/file".
        use_ema: use the averaged weights of the checkpoint.
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
        init_cfg: dict[str, Any] | None = None,
        use_ema: bool = False,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg)
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
        self.final_norm, self.use_ema = final_norm, use_ema

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

    def init_weights(self) -> None:
        """Load the checkpoint that `init_cfg` names, if any; the model initialised itself when it was built.

        Raises:
            CheckpointError: it cannot be read or is of another model, see `vim.models.load_into`.
        """
        self._is_init = True
        if not self.init_cfg:
            return
        source = self.init_cfg["checkpoint"]
        self.load_classifier(extract_state_dict(load_checkpoint(source), use_ema=self.use_ema))
        print_log(f"backbone weights: {source}", logger="current")

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
            print_log("the checkpoint's position embedding is left out: the config has none", logger="current")
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
