"""Maps of several strides out of a plain backbone's maps, which all have one: in plain PyTorch."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional as F


class SimpleFeaturePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (arXiv 2203.16527): scales a single map up by deconvolutions and down by
    pooling, each then brought to `out_channels`.

    Args:
        in_channels: channels of the map.
        out_channels: channels of every output.
        scales: factors, finest first, of 4, 2, 1, 0.5 and 0.25.
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
    ) -> None:
        super().__init__()
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


class RescaledMaps(nn.Module):
    """One scale out of each map, as UperNet on plain backbones takes them: map i is scaled by `scales[i]`.

    Args:
        channels: of every map, input and output.
        scales: factors, one for each map, of 4, 2, 1, 0.5 and 0.25.

    Raises:
        ValueError: a factor that is not among these.
    """

    def __init__(self, channels: int, scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Sequential(*_resize(channels, (channels, channels), s)[0]) for s in scales)

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Maps (B, C, H, W) of one size → as many maps, each of its own scale.

        Raises:
            ValueError: as many maps as scales were expected.
        """
        return tuple(scale(x) for scale, x in zip(self.scales, maps, strict=True))


def _level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    resize, channels = _resize(in_channels, (in_channels // 2, in_channels // 4), scale)
    return nn.Sequential(*resize, _convolution(channels, out_channels, 1), _convolution(out_channels, out_channels, 3))


def _resize(channels: int, narrowed: tuple[int, int], scale: float) -> tuple[list[nn.Module], int]:
    """Layers that scale a map, and their output's channels: `narrowed` after the first and the second doubling."""
    first, second = narrowed
    if scale == 4:
        up = nn.ConvTranspose2d(channels, first, 2, 2)
        return [up, LayerNorm2d(first), nn.GELU(), nn.ConvTranspose2d(first, second, 2, 2)], second
    if scale == 2:
        return [nn.ConvTranspose2d(channels, first, 2, 2)], first
    if scale == 1:
        return [], channels
    if scale in (0.5, 0.25):
        return [nn.MaxPool2d(round(1 / scale))], channels
    raise ValueError(f"scale {scale} is not one of 4, 2, 1, 0.5 and 0.25")


def _convolution(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    """A convolution and a layer norm over the channels, by the names that checkpoints of mmdet's models have."""
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, ln=LayerNorm2d(out_channels)))
