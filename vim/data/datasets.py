"""Data sets by name: ImageNet-style folders, CIFAR, iNaturalist, Fashion-MNIST, and whatever timm's factory reads."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.data
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import datasets as tv

from vim.data.fmnist import FashionMNIST
from vim.data.transforms import build_transform
from vim.errors import UserError

DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "FMNIST")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
# Readers of timm's factory, asked for by prefix: `--data-set wds/my-set --data-path FOLDER`.
_FACTORY_PREFIXES = ("wds/", "hfds/", "tfds/", "tar/")


def load_image(path: str) -> Image.Image:
    """An RGB image.

    Raises:
        UserError: the file cannot be read as an image; the message names it.
    """
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__}): replace or remove it") from error


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: {what}")
    return path


def image_folder(root: Path, transform: Callable[[Image.Image], Any]) -> tv.ImageFolder:
    """A folder with one sub-folder of images per class.

    Raises:
        UserError: the folder is missing or empty, or a class has no images (named).
    """
    _folder(root, "--data-path must hold train/ and val/, each with one folder of images per class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"{root} is empty: it must hold one folder of images per class")
    extensions = tv.folder.IMG_EXTENSIONS
    for name in classes:
        if not any(p.suffix.lower() in extensions for p in (root / name).rglob("*")):
            raise UserError(
                f"class folder {root / name} has no images: add some ({', '.join(extensions)}) or remove the folder"
            )
    return tv.ImageFolder(str(root), transform=transform, loader=load_image)


class INaturalist(tv.ImageFolder):
    """iNaturalist 2018 or 2019, labelled at one level of its taxonomy (`{train,val}{year}.json`, `categories.json`)."""

    def __init__(self, root: Path, *, train: bool, year: int, category: str, transform: Any) -> None:
        annotations = root / f"{'train' if train else 'val'}{year}.json"
        try:
            targets = {c["id"]: c[category] for c in json.loads((root / "categories.json").read_text())}
            first = json.loads((root / f"train{year}.json").read_text())
            content = first if train else json.loads(annotations.read_text())
            # The class numbers are those of the training split, in order of first appearance.
            numbers: dict[str, int] = {}
            for entry in first["annotations"]:
                numbers.setdefault(targets[entry["category_id"]], len(numbers))
            files = {image["id"]: image["file_name"] for image in content["images"]}
            self.samples = [
                (str(root / files[e["image_id"]]), numbers[targets[e["category_id"]]]) for e in content["annotations"]
            ]
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise UserError(
                f"{root} does not hold iNaturalist {year} with labels by {category!r}: it needs categories.json, "
                f"train{year}.json and val{year}.json ({error})"
            ) from error
        self.loader, self.transform, self.target_transform = load_image, transform, None
        self.classes = list(numbers)


def build_dataset(is_train: bool, args: argparse.Namespace) -> tuple[Dataset, int]:
    """One split, with its transform, and its number of classes.

    Raises:
        UserError: unknown data set, missing data, or data that does not have the expected form.
    """
    transform = build_transform(is_train, args)
    name, split = args.data_set, "train" if is_train else "val"
    if name not in DATA_SETS and not name.startswith(_FACTORY_PREFIXES):
        raise UserError(
            f"--data-set is {name!r}, expected one of {', '.join(DATA_SETS)} or a name that begins with "
            f"{', '.join(_FACTORY_PREFIXES)}"
        )
    if name == "FMNIST":
        folder = _folder(Path(args.data_path), "--data-path must be Fashion-MNIST's folder") if args.data_path else None
        mode = "L" if args.in_chans == 1 else "RGB"
        return FashionMNIST(train=is_train, folder=folder, mode=mode, transform=transform), 10
    if not args.data_path:
        raise UserError(f"--data-set {name} needs --data-path, the folder that holds it")
    root = Path(args.data_path)
    if name == "IMNET":
        _folder(root, "--data-path must hold train/ and val/, each with one folder of images per class")
        data = image_folder(root / split, transform)
        return data, len(data.classes)
    if name == "CIFAR":
        try:
            return tv.CIFAR100(str(root), train=is_train, transform=transform, download=False), 100
        except RuntimeError as error:
            raise UserError(
                f"{root} does not hold CIFAR-100: unpack cifar-100-python.tar.gz of the original set into it"
            ) from error
    if name in ("INAT", "INAT19"):
        year = 2018 if name == "INAT" else 2019
        data = INaturalist(root, train=is_train, year=year, category=args.inat_category, transform=transform)
        return data, len(data.classes)
    # timm reads folders and tar files by the empty prefix.
    data = timm.data.create_dataset(
        name.removeprefix("tar/") if name.startswith("tar/") else name,
        root=str(root), split="train" if is_train else "validation", is_training=is_train,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    data.transform = transform
    if not args.num_classes:
        raise UserError(f"--data-set {name} does not say how many classes it has: pass --num-classes")
    return data, args.num_classes


def build_datasets(args: argparse.Namespace) -> tuple[Dataset | None, Dataset, int]:
    """Training set (None with --eval), evaluation set and number of classes.

    Raises:
        UserError: see `build_dataset`; or the two splits have different classes.
    """
    eval_set, num_classes = build_dataset(False, args)
    if args.eval:
        return None, eval_set, num_classes
    train_set, train_classes = build_dataset(True, args)
    names = [getattr(data, "classes", None) for data in (train_set, eval_set)]
    if train_classes != num_classes or names[0] != names[1]:
        raise UserError(
            f"the training split has {train_classes} classes and the evaluation split {num_classes}, or other names: "
            "they must have the same class folders"
        )
    return train_set, eval_set, num_classes
