"""Vim as a backbone of transformers: maps of strides 4, 8, 16 and 32, by the name "vim_pyramid" in its Auto classes."""

from typing import Any

import torch
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from vim.dense.features import VimFeatures
from vim.dense.pyramid import RescaledMaps
from vim.dense.standalone.task import map_stride, scales_of


class VimPyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `VimPyramid`.

    Args:
        arch: registered model, e.g. "vim_tiny_patch16_224".
        img_size: side of the training images in pixels.
        blocks: blocks whose maps become the levels, counted from 0; None spreads them evenly, the last block included.
        model_args: further arguments of the model.
    """

    model_type = "vim_pyramid"

    def __init__(
        self,
        arch: str = "vim_tiny_patch16_224",
        img_size: int = 512,
        blocks: list[int] | None = None,
        model_args: dict[str, Any] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.arch, self.img_size, self.blocks, self.model_args = arch, img_size, blocks, dict(model_args or {})
        self.stage_names = ["stride4", "stride8", "stride16", "stride32"]
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        if out_features is None and out_indices is None:
            out_features = self.stage_names
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)


class VimPyramid(BackboneMixin, PreTrainedModel):
    """Maps of four blocks of Vim, each scaled to a stride of its own.

    Args:
        config: see `VimPyramidConfig`.

    Raises:
        ValueError: fewer than four blocks, or patches that lead to other strides; or see `VimFeatures`.
    """

    config_class = VimPyramidConfig
    base_model_prefix = "vim_pyramid"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    has_attentions = False

    def __init__(self, config: VimPyramidConfig) -> None:
        super().__init__(config)
        blocks = config.blocks or _spread(config)
        self.features = VimFeatures(config.arch, config.img_size, blocks, **config.model_args)
        scales = scales_of(map_stride(self.features))
        width = self.features.vim.embed_dim
        # Where the patches are fine, the coarsest levels are pooled twice.
        self.pyramid = RescaledMaps(width, [*scales, *[0.25] * (4 - len(scales))])
        self.num_features = [width] * 4
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Vim and its pyramid have their own initial weights."""

    def _set_gradient_checkpointing(self, enable: bool = True, **_: Any) -> None:
        self.features.vim.set_grad_checkpointing(enable)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BackboneOutput:
        """Images (B, 3, H, W) → `feature_maps`, those of `config.out_features`, finest first."""
        maps = self.pyramid(self.features(pixel_values))
        kept = tuple(m for name, m in zip(self.stage_names, maps, strict=True) if name in self.out_features)
        return BackboneOutput(feature_maps=kept)


def _spread(config: VimPyramidConfig) -> list[int]:
    """Four blocks in even steps that end with the last, e.g. 5, 11, 17 and 23 of 24."""
    with torch.device("meta"):
        depth = len(VimFeatures(config.arch, config.img_size, [-1], **config.model_args).vim.layers)
    if depth < 4:
        raise ValueError(f"the backbone has {depth} blocks, expected four or more, one for each level of the pyramid")
    return [(i + 1) * depth // 4 - 1 for i in range(4)]


AutoConfig.register("vim_pyramid", VimPyramidConfig, exist_ok=True)
AutoBackbone.register(VimPyramidConfig, VimPyramid, exist_ok=True)
