"""Readers of data sets laid out as COCO and as ADE20K, and batches whose random numbers follow from their place."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from vim.dense import shapes
from vim.errors import UserError

IGNORED = 255
SPLITS = ("training", "validation")
# Folder of images and annotation file of each split: COCO's own names, and those of ADE20K's layout.
_COCO_LAYOUTS = (
    (("train2017", "val2017"), ("annotations/instances_train2017.json", "annotations/instances_val2017.json")),
    (
        ("images/training", "images/validation"),
        ("annotations/instances_training.json", "annotations/instances_validation.json"),
    ),
)
_SEE = "see docs/downstream.md for the layout"
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


class CocoInstances(Dataset):
    """Images and instances of a split of a data set laid out as COCO.

    Items are an image (3, H, W) and a dict with `boxes` (N, 4: x1, y1, x2, y2), `labels` (N,) counted from 1, `masks`
    (N, H, W), `iscrowd` (N,), after `transform`.

    Args:
        root: folder of the data set.
        split: "training" or "validation".
        transform: of torchvision's v2 kind, or None.
        crowds: keep regions that are annotated as crowds, which evaluation passes over.

    Raises:
        UserError: folders or annotations are missing or are no COCO's.
    """

    def __init__(self, root: Path, split: str, transform: Callable | None = None, *, crowds: bool = False) -> None:
        i = SPLITS.index(split)
        for folders, files in _COCO_LAYOUTS:
            folder, file = root / folders[i], root / files[i]
            if file.is_file():
                break
        else:
            raise UserError(f"{root} has no annotation file {_COCO_LAYOUTS[0][1][i]}: {_SEE}")
        if not folder.is_dir():
            raise UserError(f"{root} has no folder {folder.relative_to(root)}: {_SEE}")
        try:
            content = json.loads(file.read_text())
            categories = sorted((c["id"], c["name"]) for c in content["categories"])
            images = {image["id"] for image in content["images"]}
            bad = [a["id"] for a in content["annotations"] if a["image_id"] not in images]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not a COCO annotation file: no lists of images, annotations and categories in it"
            ) from error
        if bad or not images or not categories:
            what = f"annotation {bad[0]} is of an image that it lacks" if bad else "it has no images or no categories"
            raise UserError(f"{file} is not a complete COCO annotation file: {what}")
        self.classes = [name for _, name in categories]
        self._label_of = {number: label for label, (number, _) in enumerate(categories, 1)}
        coco = _quietly(lambda: CocoDetection(folder, file))
        self._data = wrap_dataset_for_transforms_v2(coco, ["boxes", "labels", "masks", "iscrowd", "image_id"])
        self._folder, self._transform, self._crowds = folder, transform, crowds

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            image, raw = self._data[index]
        except (OSError, ValueError) as error:
            raise UserError(f"image {index} of {self._folder} cannot be read: {error}") from error
        image = v2.functional.to_image(image)
        size = tuple(image.shape[-2:])
        if "boxes" in raw:
            target = {
                "boxes": raw["boxes"].float(),
                "labels": torch.tensor([self._label_of[int(number)] for number in raw["labels"]]),
                "masks": raw["masks"],
                "iscrowd": torch.tensor(raw["iscrowd"], dtype=torch.int64),
            }
        else:
            target = {
                "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64),
                "masks": torch.zeros(0, *size, dtype=torch.uint8),
                "iscrowd": torch.zeros(0, dtype=torch.int64),
            }
        if not self._crowds:
            target = {name: value[target["iscrowd"] == 0] for name, value in target.items()}
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        target["masks"] = tv_tensors.Mask(target["masks"])
        return self._transform(image, target) if self._transform else (image, target)


class LabelMaps(Dataset):
    """Images and label maps of a split of a data set laid out as ADE20K.

    Items are an image (3, H, W) and labels (H, W) int64, after `transform`. In the files 0 means unlabelled and class i
    is i + 1; here class i is i, and `IGNORED` means unlabelled.

    Args:
        root: folder of the data set, with `images/SPLIT`, `annotations/SPLIT`, and the names of the classes in
            `classes.txt`, one a line, or in ADE20K's `objectInfo150.txt`.
        split: "training" or "validation".
        transform: of torchvision's v2 kind, or None.

    Raises:
        UserError: folders, label maps or names are missing.
    """

    def __init__(self, root: Path, split: str, transform: Callable | None = None) -> None:
        images, maps = root / "images" / split, root / "annotations" / split
        for folder in (images, maps):
            if not folder.is_dir():
                raise UserError(f"{root} has no folder {folder.relative_to(root)}: {_SEE}")
        files = sorted(p for p in images.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise UserError(f"{images} holds no images: {_SEE}")
        self._pairs = [(image, maps / f"{image.stem}.png") for image in files]
        if missing := [label for _, label in self._pairs if not label.is_file()]:
            raise UserError(f"{maps} has no {missing[0].name}, the label map of an image: {_SEE}")
        self.classes = _class_names(root)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file, map_file = self._pairs[index]
        image, labels = read_image(file), _open(map_file)
        labels = v2.functional.pil_to_tensor(labels)[0].long()
        if labels.shape != image.shape[-2:]:
            raise UserError(
                f"{map_file} is {tuple(labels.shape)} pixels, its image {tuple(image.shape[-2:])}: expected one size"
            )
        labels = torch.where(labels == 0, IGNORED, labels - 1)
        over = labels[(labels >= len(self.classes)) & (labels != IGNORED)]
        if len(over):
            raise UserError(
                f"{map_file} has the label {int(over[0]) + 1}, but {len(self.classes)} classes have names: labels "
                "count from 1, and 0 means unlabelled"
            )
        labels = tv_tensors.Mask(labels)
        return self._transform(image, labels) if self._transform else (image, labels)


def _class_names(root: Path) -> list[str]:
    own, ade = root / "classes.txt", root / "objectInfo150.txt"
    if own.is_file():
        names = [line.strip() for line in own.read_text().splitlines() if line.strip()]
    elif ade.is_file():
        # A head line, then number, shares and name in columns that tabs part.
        names = [line.split("\t")[-1].split(",")[0].strip() for line in ade.read_text().splitlines()[1:] if line]
    else:
        raise UserError(f"{root} has neither classes.txt, the classes' names one a line, nor objectInfo150.txt: {_SEE}")
    if not 2 <= len(names) < IGNORED:
        raise UserError(f"{root} names {len(names)} classes, expected 2 to {IGNORED - 1}")
    return names


def read_image(path: Path) -> Tensor:
    """An image file as a uint8 image (3, H, W).

    Raises:
        UserError: it cannot be read.
    """
    return v2.functional.to_image(_open(path).convert("RGB"))


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): give a JPEG or PNG file") from error
    return image


def _quietly(build: Callable[[], Any]) -> Any:
    """pycocotools prints its progress; what it says is no news."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return build()


def tighten(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Boxes as what a cut left of the masks says; instances without a pixel left are dropped."""
    masks = target["masks"]
    kept = masks.flatten(1).any(1).bool()
    target = {name: value[kept] for name, value in target.items()}
    if kept.any():
        # Corners lie at the far side of the last pixel.
        boxes = masks_to_boxes(masks[kept]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    return image, target


def find_data(data: str, folder: Path) -> Path:
    """The folder of a data set; "shapes" is made on first use.

    Args:
        data: `--data`.
        folder: where the synthetic shapes go.

    Raises:
        UserError: there is no such folder.
    """
    if data == "shapes":
        if not (folder / "annotations" / "instances_validation.json").is_file():
            _write_shapes(folder)
        return folder
    if not Path(data).is_dir():
        raise UserError(f"there is no data set at {data}: give its folder, or --data shapes for synthetic ones")
    return Path(data)


def _write_shapes(folder: Path) -> None:
    """Write the shapes as a whole: processes that start together all find the folder missing."""
    if folder.exists():
        shapes.write(folder)
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shapes.write(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(temporary)


class EndlessSampler(Sampler[tuple[int, int]]):
    """Endless epochs, each in an order of its own, as pairs of position and index.

    Args:
        length: of the data set.
        seed: of all orders.
        start: first position.
        rank: of this process.
        world: number of processes, which take turns.
    """

    def __init__(self, length: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.start, self.rank, self.world = length, seed, start, rank, world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch, order = self.start + self.rank, -1, torch.empty(0)
        while True:
            if position // self.length != epoch:
                epoch = position // self.length
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + epoch))
            yield position, int(order[position % self.length])
            position += self.world


class Seeded(Dataset):
    """Items by position and index, whose augmentation depends on seed and position alone: a resumed run repeats them.

    Args:
        data: the data set.
        seed: of the run.
    """

    def __init__(self, data: Dataset, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        position, index = place
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * (self.seed + 1) + position)
            return self.data[index]
