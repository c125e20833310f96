"""Dense prediction with Vim: what mmdet 3 and mmseg 1 need to know, registered with mmengine on import.

Configs name this package in `custom_imports`. It stands in `vim` so that det/ and seg/ share it; nothing else in `vim`
imports it, since the OpenMMLab packages are an extra (`scripts/install_openmmlab.sh`).
"""

from vim.dense.stack import require_stack

require_stack()

from vim.dense.backbone import VimBackbone  # noqa: E402
from vim.dense.layer_decay import VimLayerDecayConstructor  # noqa: E402
from vim.dense.necks import SimpleFeaturePyramid  # noqa: E402

__all__ = ["SimpleFeaturePyramid", "VimBackbone", "VimLayerDecayConstructor"]
