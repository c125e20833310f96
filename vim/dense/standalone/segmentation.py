"""UperNet and Mask2Former of transformers on Vim."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from vim.dense.standalone.data import IGNORED, LabelMaps
from vim.dense.standalone.hf_backbone import VimPyramidConfig
from vim.dense.standalone.task import Spec, Task, features_of, palette

_GREY = 114
# Below this width the model is one for small images.
_SMALL = 128


def build_upernet(spec: Spec) -> UperNetForSemanticSegmentation:
    """UperNet with the auxiliary head of the published runs, on the map of stride 16."""
    names = dict(enumerate(spec.classes))
    config = UperNetConfig(
        backbone_config=VimPyramidConfig(spec.arch, spec.img_size, model_args=spec.model_args),
        hidden_size=spec.width,
        auxiliary_channels=min(spec.width, 256),
        loss_ignore_index=IGNORED,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    return UperNetForSemanticSegmentation(config)


def build_mask2former(spec: Spec) -> Mask2FormerForUniversalSegmentation:
    """Mask2Former with transformers' own sizes; smaller where the width is below 128."""
    names, small = dict(enumerate(spec.classes)), spec.width < _SMALL
    sizes: dict[str, Any] = {
        "feature_size": spec.width, "mask_feature_size": spec.width, "hidden_dim": spec.width,
        "num_attention_heads": max(1, spec.width // 32),
    }  # fmt: skip
    if small:
        sizes |= {
            "encoder_layers": 2, "decoder_layers": 4, "encoder_feedforward_dim": 4 * spec.width, "num_queries": 20,
            "dim_feedforward": 4 * spec.width, "train_num_points": 1024,
        }  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=VimPyramidConfig(spec.arch, spec.img_size, model_args=spec.model_args),
        ignore_value=IGNORED,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **sizes,
    )
    return Mask2FormerForUniversalSegmentation(config)


# A list that only decides on a warning.
Mask2FormerConfig.backbones_supported = [*Mask2FormerConfig.backbones_supported, VimPyramidConfig.model_type]
_BUILDERS: dict[str, Callable[[Spec], PreTrainedModel]] = {"upernet": build_upernet, "mask2former": build_mask2former}


def class_logits(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Scores of the classes (B, classes, H, W), float32, of normalised images (B, 3, H, W)."""
    outputs = model(pixel_values=images)
    if hasattr(outputs, "logits"):
        return outputs.logits.float()
    # Mask2Former: each query votes for its class where its mask is.
    classes = outputs.class_queries_logits.float().softmax(-1)[..., :-1]
    scores = torch.einsum("bqc,bqhw->bchw", classes, outputs.masks_queries_logits.float().sigmoid())
    return F.interpolate(scores, images.shape[-2:], mode="bilinear", align_corners=False)


def sliding_logits(model: PreTrainedModel, images: Tensor, window: int) -> Tensor:
    """`class_logits` of windows of the training size, every two thirds of it, averaged where they overlap.

    Args:
        model: see `class_logits`.
        images: normalised images (B, 3, H, W).
        window: side of the windows; smaller images are padded with zeros.
    """
    height, width = images.shape[-2:]
    images = F.pad(images, (0, max(0, window - width), 0, max(0, window - height)))
    total, count = None, images.new_zeros(1, 1, *images.shape[-2:], dtype=torch.float32)
    for top in _starts(images.shape[-2], window):
        for left in _starts(images.shape[-1], window):
            at = (..., slice(top, top + window), slice(left, left + window))
            logits = class_logits(model, images[at])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[at] += logits
            count[at] += 1
    assert total is not None
    return (total / count)[..., :height, :width]


def _starts(side: int, window: int) -> list[int]:
    """First pixels of the windows that cover a side."""
    stride = max(1, window * 2 // 3)
    return sorted({min(start, side - window) for start in range(0, side - window + stride, stride)})


class Segmentation(Task):
    """Classes of pixels, in data sets laid out as ADE20K."""

    name, heads, metric = "seg", tuple(_BUILDERS), "mIoU"

    def data(self, root: Path, split: str, img_size: int, *, train: bool, jitter: bool) -> Dataset:
        return LabelMaps(root, split, train_transform(img_size, jitter) if train else None)

    def build(self, spec: Spec, *, grad_checkpointing: bool = False) -> nn.Module:
        model = _BUILDERS[spec.head](spec)
        features_of(model)[1].vim.set_grad_checkpointing(grad_checkpointing)
        return model

    def collate(self, items: list[Any]) -> Any:
        return default_collate([(image.as_subclass(Tensor), labels.as_subclass(Tensor)) for image, labels in items])

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        images = _normalised(images)
        if getattr(getattr(model, "module", model), "decode_head", None) is not None:
            return {"loss": model(pixel_values=images, labels=labels).loss}
        present = [torch.unique(one[one != IGNORED]) for one in labels]
        masks = [(one == classes[:, None, None]).float() for one, classes in zip(labels, present, strict=True)]
        return {"loss": model(pixel_values=images, mask_labels=masks, class_labels=present).loss.squeeze()}

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, spec: Spec, data: Dataset, indices: range) -> dict[str, float]:
        from torchmetrics.classification import MulticlassJaccardIndex

        names, device = spec.classes, next(model.parameters()).device
        metric = MulticlassJaccardIndex(len(names), average=None, ignore_index=IGNORED).to(device)
        for i in indices:
            image, labels = data[i]
            metric.update(_predict(model, image.to(device), spec)[None], labels.to(device)[None])
        values = metric.compute().cpu()
        # The confusion matrix tells classes that occur nowhere from those that are never found.
        known = metric.confmat.cpu()
        occurs = (known.sum(0) + known.sum(1)) > 0
        result = {"mIoU": 100 * float(values[occurs].mean())}
        if len(names) <= 10:
            result |= {f"IoU_{name}": 100 * float(v) for name, v in zip(names, values, strict=True)}
        return result

    @torch.inference_mode()
    def draw(self, model: nn.Module, image: Tensor, spec: Spec, *, score: float, opacity: float) -> tuple[Tensor, str]:
        labels = _predict(model, image, spec).cpu()
        masks = labels == torch.arange(len(spec.classes))[:, None, None]
        picture = draw_segmentation_masks(image.cpu(), masks, alpha=opacity, colors=palette(len(spec.classes)))
        shares = 100 * masks.flatten(1).float().mean(1)
        order = [i for i in shares.argsort(descending=True).tolist() if shares[i] >= 0.5]
        return picture, ", ".join(f"{spec.classes[i]} {shares[i]:.0f} %" for i in order)


def _predict(model: nn.Module, image: Tensor, spec: Spec) -> Tensor:
    """Classes (H, W) of an image (3, H, W), whose shorter side is brought to that of training if that was rescaled."""
    size = list(image.shape[-2:])
    image = image.as_subclass(Tensor)[None]
    if spec.jitter:
        image = v2.functional.resize(image, [spec.img_size], antialias=True)
    logits = sliding_logits(model, _normalised(image), spec.img_size)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].argmax(0)


def _normalised(images: Tensor) -> Tensor:
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=images.device)[:, None, None]
    return (images.float() / 255 - mean) / std


def train_transform(img_size: int, jitter: bool) -> Callable:
    """Cuts and mirror images; with `jitter` also sizes, a shorter side of half to twice `img_size`, and colours."""
    fill: dict[Any, Any] = {tv_tensors.Image: _GREY, "others": IGNORED}
    steps: list[Any] = [
        v2.RandomCrop(img_size, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
    ]
    if jitter:
        steps.insert(0, v2.RandomResize(img_size // 2, 2 * img_size, antialias=True))
        steps.append(v2.RandomPhotometricDistort())
    return v2.Compose(steps)
