"""What the training loop and the command line ask of a task."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vim.dense.features import VimFeatures


@dataclass
class Spec:
    """What a model is built from; checkpoints hold it, so that nothing of it need be given again.

    Attributes:
        arch: registered model.
        img_size: side of the training images in pixels.
        classes: names.
        head: of the task.
        width: channels of pyramid and heads.
        jitter: whether training images are rescaled at random, about the size that `img_size` says.
        model_args: further arguments of the backbone.
    """

    arch: str
    img_size: int
    classes: list[str]
    head: str
    width: int
    jitter: bool = True
    model_args: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Detection or segmentation: data, model, loss, metrics and pictures.

    Attributes:
        name: "det" or "seg".
        heads: names of the heads, the default first.
        metric: name of the metric that chooses the best checkpoint.
    """

    name: str
    heads: tuple[str, ...]
    metric: str

    @abstractmethod
    def data(self, root: Path, split: str, img_size: int, *, train: bool, jitter: bool) -> Dataset:
        """A split, with augmentation if `train`; `classes` holds the classes' names.

        Args:
            root: folder of the data set.
            split: "training" or "validation".
            img_size: side of the training images.
            train: augment and bring to one size.
            jitter: rescale while augmenting.
        """

    @abstractmethod
    def build(self, spec: Spec, *, grad_checkpointing: bool = False) -> nn.Module:
        """The model, with initial weights."""

    @abstractmethod
    def collate(self, items: list[Any]) -> Any:
        """Items of `data` as a batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """Losses of a batch by name; their sum is minimised."""

    @abstractmethod
    def evaluate(self, model: nn.Module, spec: Spec, data: Dataset, indices: range) -> dict[str, float]:
        """Metrics in percent, over the items of all processes; this one looks at `indices`.

        Args:
            model: in evaluation mode.
            spec: of the model.
            data: a split without augmentation.
            indices: into `data`.
        """

    @abstractmethod
    def draw(self, model: nn.Module, image: Tensor, spec: Spec, *, score: float, opacity: float) -> tuple[Tensor, str]:
        """A uint8 image (3, H, W) with the prediction drawn on it, and a line about what was found.

        Args:
            model: in evaluation mode.
            image: (3, H, W) uint8, on the model's device.
            spec: of the model.
            score: least score of an instance that is drawn.
            opacity: of colours over the image.
        """


def features_of(model: nn.Module) -> tuple[str, VimFeatures]:
    """The backbone inside a dense model, and its dotted name."""
    return next((name, part) for name, part in model.named_modules() if isinstance(part, VimFeatures))


def map_stride(features: VimFeatures) -> int:
    """Pixels between neighbours of the backbone's maps."""
    return features.vim.patch_embed.stride[0]


def scales_of(stride: int) -> tuple[float, ...]:
    """Factors of the pyramid that lead from maps of `stride` to strides 4, 8, 16 and 32, as far as they exist.

    Raises:
        ValueError: no factor does.
    """
    scales = tuple(s for s in (4, 2, 1, 0.5) if stride / s in (4, 8, 16, 32))
    if not scales:
        raise ValueError(f"maps of stride {stride} lead to none of the strides 4, 8, 16 and 32")
    return scales


def palette(count: int) -> list[tuple[int, int, int]]:
    """Distinct colours, the same for every call."""
    import colorsys

    # Steps of the golden ratio keep neighbours apart.
    return [
        tuple(round(255 * v) for v in colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65 + 0.3 * (i % 2), 0.9))
        for i in range(count)
    ]
