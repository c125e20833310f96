"""Importing this module registers the backbone, the pyramid and the layer decay with mmengine."""

from vim.dense.stack import require_stack

require_stack()

from mmengine.registry import MODELS  # noqa: E402
from timm.layers import LayerNorm2d  # noqa: E402

from vim.dense.backbone import VimBackbone  # noqa: E402
from vim.dense.layer_decay import VimLayerDecayConstructor  # noqa: E402
from vim.dense.pyramid import SimpleFeaturePyramid  # noqa: E402

MODELS.register_module(module=SimpleFeaturePyramid)
# Layer norm over the channels of (B, C, H, W), by the name that ViTDet's configs use.
MODELS.register_module("LN2d", module=LayerNorm2d)

__all__ = ["SimpleFeaturePyramid", "VimBackbone", "VimLayerDecayConstructor"]
