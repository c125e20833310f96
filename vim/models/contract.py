"""What timm expects of every model besides its forward pass: parameter groups, a new head, another image size."""

from typing import Any

import torch
from torch import nn

from vim.models.checks import checked_indices
from vim.models.initialisation import init_head
from vim.models.layout import TokenLayout
from vim.models.patch_embed import checked_size, update_model_input_size
from vim.models.pos_embed import resample_pos_embed
from vim.models.tokens import checked_pool


class TimmContract(nn.Module):
    """The methods that `VisionMamba` adds to a module for timm; their attributes are set there."""

    __jit_unused_properties__ = ("token_layout", "head_hidden_size", "input_shape")

    @property
    def head_hidden_size(self) -> int:
        """Channels that the head reads."""
        if self.global_pool == "registers":
            return self.embed_dim // self.register_reduce * self.num_prefix_tokens
        return self.embed_dim

    @property
    def token_layout(self) -> TokenLayout:
        """Positions of the tokens of an image of the model's own size; `grid` is that of the position embedding."""
        frames = self.num_frames // self.patch_embed.tubelet if self.num_frames else 1
        return self._layout(self.patch_embed.grid_size, frames)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a sample: (channels, height, width), of a clip (channels, frames, height, width)."""
        frames = (self.num_frames,) if self.num_frames else ()
        return (self.in_chans, *frames, *self.patch_embed.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names left out of weight decay beyond one-dimensional parameters, as in the published runs."""
        tokens = {"cls_token", "cls_token_head", "cls_token_tail"}
        return {"pos_embed", "pos_embed_cls", "temporal_pos_embedding"} | tokens

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: stem, blocks, final norm."""
        return {
            "stem": r"^cls_token|^pos_embed|^temporal_pos_embedding|^patch_embed|^rope",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f|^neck|^norm_neck", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, or by none for 0 classes, and optionally the pooling.

        Raises:
            ValueError: a negative number of classes, or an unknown pooling.
        """
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes is {num_classes!r}, expected a whole number of at least 0")
        pool = checked_pool(global_pool, self.global_pool, self.class_token)
        if pool == "registers" != self.global_pool:
            raise ValueError("global_pool='registers' cannot be set later: build a new model")
        self.global_pool, self.num_classes = pool, num_classes
        if pool != "registers":
            self.neck, self.norm_neck = nn.Identity(), nn.Identity()
        self.head = nn.Identity()
        if num_classes > 0:
            weight = self.patch_embed.proj.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            init_head(self.head)
        for module in (self.neck, self.norm_neck, self.head):
            module.train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size, the patch size or both, resampling position embedding and patch filters.

        With a new patch size the stride follows if it was the patch size, else it stays.

        Raises:
            ValueError: sizes that are not positive, or an image smaller than a patch.
        """
        embed, old_grid = self.patch_embed, self.patch_embed.grid_size
        patch_size = embed.patch_size if patch_size is None else checked_size("patch_size", patch_size)
        least = (1, 1) if embed.pad else patch_size
        img_size = checked_size("img_size", embed.img_size if img_size is None else img_size, least)
        if patch_size != embed.patch_size:
            self.patch_embed = embed = embed.resized(patch_size, img_size)
            for info in self.feature_info:
                info["reduction"] = embed.feat_ratio()
        embed.grid_size, embed.img_size = embed.dynamic_feat_size(img_size), img_size
        if update_model_input_size is not None:
            update_model_input_size(self, img_size, patch_size=embed.patch_size, stride=embed.stride)
        if embed.grid_size == old_grid:
            return
        if self.pos_embed is not None:
            resampled = resample_pos_embed(
                self.pos_embed.data,
                embed.grid_size,
                class_token=self.class_rows,
                old_grid=old_grid,
                antialias=self.pos_embed_antialias,
            )
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.set_grid(embed.grid_size)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one in `indices`, and the norm and head if asked; gives the indices kept.

        Raises:
            ValueError: indices out of range.
        """
        take, last = checked_indices(len(self.layers), self.if_bidirectional, indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = None
        if prune_head:
            self.reset_classifier(0)
        return take
