"""Importing this module registers the backbone, the pyramid and the layer decay with mmengine."""

from vim.dense.stack import require_stack

require_stack()

from vim.dense.backbone import VimBackbone  # noqa: E402
from vim.dense.layer_decay import VimLayerDecayConstructor  # noqa: E402
from vim.dense.necks import SimpleFeaturePyramid  # noqa: E402

__all__ = ["SimpleFeaturePyramid", "VimBackbone", "VimLayerDecayConstructor"]
