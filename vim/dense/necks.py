"""The simple feature pyramid of ViTDet (arXiv 2203.16527): several scales out of one map."""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional as F

# Layer norm over the channels of (B, C, H, W), by the name that ViTDet's configs use.
MODELS.register_module("LN2d", module=LayerNorm2d)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Scales a single map up by deconvolutions and down by pooling, each then brought to `out_channels`.

    Args:
        in_channels: channels of the map.
        out_channels: channels of every output.
        scales: factors, finest first, of 4, 2, 1 and 0.5.
        num_outs: outputs; those beyond `scales` halve the last one by subsampling.

    Raises:
        ValueError: a factor that is not among these, or fewer outputs than scales.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int = 5,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_outs < len(scales):
            raise ValueError(f"num_outs is {num_outs}, fewer than the {len(scales)} scales")
        self.extra = num_outs - len(scales)
        self.levels = nn.ModuleList(_level(in_channels, out_channels, scale) for scale in scales)

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One map (B, C, H, W), in a sequence as backbones give it → `num_outs` maps, finest first."""
        # mmcv's compiled RoIAlign reads memory as if it were contiguous; what the layer norm gives is not.
        outs = [level(maps[-1]).contiguous() for level in self.levels]
        for _ in range(self.extra):
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)


def _level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    half, quarter = in_channels // 2, in_channels // 4
    if scale == 4:
        resize = [
            nn.ConvTranspose2d(in_channels, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        ]
        channels = quarter
    elif scale == 2:
        resize, channels = [nn.ConvTranspose2d(in_channels, half, 2, 2)], half
    elif scale == 1:
        resize, channels = [], in_channels
    elif scale == 0.5:
        resize, channels = [nn.MaxPool2d(2, 2)], in_channels
    else:
        raise ValueError(f"scale {scale} is not one of 4, 2, 1 and 0.5")
    norm = {"type": "LN2d"}
    return nn.Sequential(
        *resize,
        ConvModule(channels, out_channels, 1, norm_cfg=norm, act_cfg=None),
        ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm, act_cfg=None),
    )
