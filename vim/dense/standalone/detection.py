"""Mask R-CNN of torchvision on Vim: a simple feature pyramid over the last map, as in ViTDet (arXiv 2203.16527)."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from vim.dense.features import VimFeatures
from vim.dense.pyramid import SimpleFeaturePyramid
from vim.dense.standalone.data import CocoInstances, tighten
from vim.dense.standalone.task import Spec, Task, map_stride, palette, scales_of

# Grey of the padding, about the mean of images.
_GREY = 114
# Below this width the model is one for small images: fewer convolutions, proposals and samples.
_SMALL = 128


class PyramidBackbone(nn.Module):
    """Vim and its pyramid as a backbone of torchvision's detectors.

    Args:
        features: with one map.
        out_channels: channels of the pyramid.
        extra: whether a further, subsampled level follows.

    Attributes:
        strides: of the levels, finest first.
    """

    def __init__(self, features: VimFeatures, out_channels: int, *, extra: bool) -> None:
        super().__init__()
        stride = map_stride(features)
        scales = scales_of(stride)
        self.features, self.out_channels = features, out_channels
        self.pyramid = SimpleFeaturePyramid(features.vim.embed_dim, out_channels, scales, len(scales) + extra)
        self.strides = [int(stride / s) for s in scales]
        if extra:
            self.strides.append(2 * self.strides[-1])

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, H, W) → maps by the names "0", "1", ..., finest first."""
        return OrderedDict((str(i), m) for i, m in enumerate(self.pyramid(self.features(x))))


def build_mask_rcnn(spec: Spec, *, grad_checkpointing: bool = False) -> MaskRCNN:
    """torchvision's Mask R-CNN over Vim's pyramid, with layer norm in the heads.

    Args:
        spec: of the model. A width below 128 makes a model for small images.
        grad_checkpointing: recompute the backbone's blocks in the backward pass.

    Raises:
        ValueError: see `VimFeatures` and `scales_of`.
    """
    small, width = spec.width < _SMALL, spec.width
    features = VimFeatures(spec.arch, spec.img_size, [-1], grad_checkpointing=grad_checkpointing, **spec.model_args)
    backbone = PyramidBackbone(features, width, extra=not small)
    anchors = AnchorGenerator(
        sizes=tuple(((5 if small else 8) * s,) for s in backbone.strides),
        aspect_ratios=((0.5, 1.0, 2.0),) * len(backbone.strides),
    )
    # The extra level is for proposals alone.
    levels = [str(i) for i in range(len(backbone.strides) - (not small))]
    # Instances of this size are pooled from the level of stride 16.
    canonical = 112 if small else 224

    def pool(size: int) -> MultiScaleRoIAlign:
        return MultiScaleRoIAlign(levels, size, 2, canonical_scale=canonical)

    shared, hidden = (2, 128) if small else (4, 1024)
    classes = len(spec.classes) + 1
    limits: dict[str, Any] = {}
    if small:
        limits = {
            "rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32, "rpn_pre_nms_top_n_train": 200,
            "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 50,
            "box_detections_per_img": 20,
        }  # fmt: skip
    else:
        limits = {"rpn_post_nms_top_n_train": 1000}
    model = MaskRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=1 if small else 2),
        box_roi_pool=pool(7),
        box_head=FastRCNNConvFCHead((width, 7, 7), [width] * shared, [hidden], norm_layer=LayerNorm2d),
        box_predictor=FastRCNNPredictor(hidden, classes),
        mask_roi_pool=pool(14),
        mask_head=MaskRCNNHeads(width, [width] * shared, 1, norm_layer=LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
        min_size=spec.img_size,
        max_size=spec.img_size,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        **limits,
    )
    # Batches are padded to squares, so that the position embedding keeps the grid that it is trained on.
    model.transform.size_divisible = spec.img_size
    return model


class Detection(Task):
    """Boxes and masks of instances, in data sets laid out as COCO."""

    name, heads, metric = "det", ("mask-rcnn",), "box_mAP"

    def data(self, root: Path, split: str, img_size: int, *, train: bool, jitter: bool) -> Dataset:
        return CocoInstances(root, split, train_transform(img_size, jitter) if train else None, crowds=not train)

    def build(self, spec: Spec, *, grad_checkpointing: bool = False) -> nn.Module:
        return build_mask_rcnn(spec, grad_checkpointing=grad_checkpointing)

    def collate(self, items: list[Any]) -> Any:
        return tuple(zip(*items, strict=True))

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        images, targets = batch
        wanted = ("boxes", "labels", "masks")
        targets = [{name: t[name].to(device, non_blocking=True) for name in wanted} for t in targets]
        return model([_as_float(image, device) for image in images], targets)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, spec: Spec, data: Dataset, indices: range) -> dict[str, float]:
        from torchmetrics.detection import MeanAveragePrecision

        device = next(model.parameters()).device
        metric = MeanAveragePrecision(iou_type=("bbox", "segm"), sync_on_compute=False)
        metric.warn_on_many_detections = False
        for i in indices:
            image, target = data[i]
            (found,) = model([_as_float(image, device)])
            found = {name: value.cpu() for name, value in found.items()}
            found["masks"] = found["masks"][:, 0] >= 0.5
            metric.update([found], [{**_plain(target), "masks": target["masks"].bool()}])
        if torch.distributed.is_initialized():
            # torchmetrics' own exchange hangs where processes have other numbers of images.
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, metric.metric_state)
            for name in shares[0]:
                setattr(metric, name, [item for share in shares for item in share[name]])
        values = metric.compute()
        names = {"bbox": "box", "segm": "mask"}
        return {
            f"{names[kind]}_{name.replace('map', 'mAP').replace('_50', '50').replace('_75', '75')}": 100
            * float(values[f"{kind}_{name}"])
            for kind in names
            for name in ("map", "map_50", "map_75")
        }

    @torch.inference_mode()
    def draw(self, model: nn.Module, image: Tensor, spec: Spec, *, score: float, opacity: float) -> tuple[Tensor, str]:
        (found,) = model([_as_float(image, image.device)])
        kept = found["scores"] >= score
        labels, scores = (found["labels"][kept] - 1).tolist(), found["scores"][kept].tolist()
        colours = palette(len(spec.classes))
        picture = image.cpu()
        if labels:
            of = [colours[i] for i in labels]
            masks = found["masks"][kept, 0].cpu() >= 0.5
            picture = draw_segmentation_masks(picture, masks, alpha=opacity, colors=of)
            names = [f"{spec.classes[i]} {s:.2f}" for i, s in zip(labels, scores, strict=True)]
            picture = draw_bounding_boxes(
                picture, found["boxes"][kept].cpu(), names, of, width=max(1, min(picture.shape[1:]) // 300)
            )
        counts = (f"{labels.count(i)} {name}" for i, name in enumerate(spec.classes) if i in labels)
        return picture, ", ".join(counts) or "nothing found"


def train_transform(img_size: int, jitter: bool) -> Callable:
    """Mirror images, and with `jitter` images scaled by 0.1 to 2 against `img_size`, then cut or padded to a square."""
    steps: list[Any] = [v2.RandomHorizontalFlip()]
    if jitter:
        fill: dict[Any, Any] = {tv_tensors.Image: _GREY, "others": 0}
        steps += [
            v2.ScaleJitter((img_size, img_size), antialias=True),
            v2.RandomCrop(img_size, pad_if_needed=True, fill=fill),
        ]
    return _Tightened(v2.Compose(steps))


class _Tightened:
    """A transform, and the boxes fitted to what it left of the masks."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return tighten(*self.transform(image, target))


def _plain(target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.as_subclass(Tensor) for name, value in target.items()}


def _as_float(image: Tensor, device: torch.device) -> Tensor:
    return image.as_subclass(Tensor).to(device, non_blocking=True).float() / 255
