"""Data sets by name: ImageNet-style folders, CIFAR, iNaturalist, Fashion-MNIST, and those of timm's factory."""

import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm.data
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision import datasets as tv

from vim.data.clips import clip_folder, clip_transform
from vim.data.fmnist import FashionMNIST
from vim.data.images import BadImageError, Samples, decode, limit_pixels
from vim.data.streams import Stream
from vim.data.transforms import build_transform
from vim.errors import UserError
from vim.flags import DATA_SETS, FACTORY_PREFIXES, Data

_logger = logging.getLogger("vision_mamba")

_STREAMS = ("wds/", "tfds/", "hfids/")
_NEEDS = {"hfds/": "datasets", "hfids/": "datasets", "wds/": "webdataset", "tfds/": "tensorflow-datasets"}
_TWO_SPLITS = "--data-path must hold train/ and val/, each with one folder of images per class"


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: {what}")
    return path


class ImageFiles(Dataset):
    """PIL images of files, with class numbers.

    Args:
        samples: path and class number of each image.
        classes: names of the classes, by number.
        mode: "RGB" or "L".
    """

    def __init__(self, samples: list[tuple[Path, int]], classes: list[str], mode: str) -> None:
        self.samples, self.classes, self.mode = samples, classes, mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return decode(path, self.mode), target


def _files_below(folder: Path) -> Iterator[Path]:
    """Files below a folder in torchvision's order, behind links too, without names that begin with "."."""

    def walk() -> Iterator[tuple[str, list[str]]]:
        for directory, folders, files in os.walk(folder, followlinks=True):
            # A link to a parent folder would be followed for ever.
            folders[:] = [
                name for name in folders
                if not name.startswith(".") and not (
                    (link := Path(directory, name)).is_symlink()
                    and Path(directory).resolve().is_relative_to(link.resolve())
                )
            ]  # fmt: skip
            yield directory, files

    for directory, files in sorted(walk()):
        yield from (Path(directory, name) for name in sorted(files) if not name.startswith("."))


def image_folder(root: Path, mode: str = "RGB") -> ImageFiles:
    """A folder with one sub-folder of images per class, as PIL images; names that begin with "." are skipped.

    Raises:
        UserError: the folder is missing or empty, or a class has no images (named).
    """
    _folder(root, _TWO_SPLITS)
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{root} is empty: it must hold one folder of images per class")
    extensions = tv.folder.IMG_EXTENSIONS
    samples: list[tuple[Path, int]] = []
    unread: Counter[str] = Counter()
    for number, name in enumerate(classes):
        before = len(samples)
        for path in _files_below(root / name):
            if path.suffix.lower() in extensions:
                samples.append((path, number))
            else:
                unread[path.suffix.lower() or "no ending"] += 1
        if len(samples) == before:
            raise UserError(
                f"class folder {root / name} has no images: add some ({', '.join(extensions)}) or remove the folder"
            )
    _say_unread(root, unread)
    return ImageFiles(samples, classes, mode)


def _say_unread(root: Path, unread: Counter[str]) -> None:
    if unread:
        kinds = ", ".join(f"{ending} {count}" for ending, count in unread.most_common(5))
        _logger.warning("%s: %d files are of types that are not read (%s)", root, unread.total(), kinds)


def inaturalist(root: Path, *, train: bool, year: int, category: str, mode: str) -> ImageFiles:
    """iNaturalist 2018 or 2019, labelled at one level of its taxonomy (`{train,val}{year}.json`, `categories.json`).

    Raises:
        UserError: a file is missing or malformed.
    """
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
        samples = [(root / files[e["image_id"]], numbers[targets[e["category_id"]]]) for e in content["annotations"]]
    except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{root} does not hold iNaturalist {year} with labels by {category!r}: it needs categories.json, "
            f"train{year}.json and val{year}.json ({error})"
        ) from error
    return ImageFiles(samples, list(numbers), mode)


class _Grey(Dataset):
    """A data set of PIL images with its images in another mode."""

    def __init__(self, images: Dataset, mode: str) -> None:
        self.images, self.mode, self.classes = images, mode, images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.images[index]
        return image.convert(self.mode), target


class ReaderImages(Dataset):
    """PIL images of one of timm's indexed readers; unlike timm's own class, it does not skip bad images."""

    def __init__(self, reader: Any, mode: str) -> None:
        self.reader, self.mode = reader, mode
        numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
        if numbers:
            self.classes = sorted(numbers, key=numbers.get)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = str(self.reader.filename(index))
        try:
            source, target = self.reader[index]
        except (OSError, EOFError, tarfile.TarError) as error:
            raise BadImageError(f"{name} cannot be read ({type(error).__name__})") from error
        return decode(source, self.mode, name), int(target)


def _from_timm(name: str, root: Path, is_train: bool, args: Data, mode: str) -> Any:
    """What timm's reader of a prefix gives: an indexed data set of PIL images, or timm's own stream.

    Raises:
        UserError: the library it needs is missing, or it cannot read the data.
    """
    split = args.train_split if is_train else args.eval_split
    prefix = name[: name.index("/") + 1]
    if prefix == "tar/":
        path = root if root.suffix == ".tar" else root / f"{split}.tar"
        if not path.is_file():
            raise UserError(f"{path} is missing: --data-set tar/ reads {split}.tar, see --train-split and --eval-split")
        try:
            # An open file, and its position, would be shared between workers.
            return ReaderImages(ReaderImageInTar(str(path), cache_tarfiles=False), mode)
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"{path} is damaged, or no tar file of one folder of images per class: copy it again ({error})"
            ) from error
    try:
        data = timm.data.create_dataset(
            name, root=str(root), split=split, is_training=is_train, batch_size=args.batch_size, seed=args.seed,
            # Pillow's images are converted by `eight_bits`; TFDS decodes by itself.
            input_img_mode=mode if prefix == "tfds/" else "",
        )  # fmt: skip
    except ImportError as error:
        raise UserError(f"--data-set {name} needs {_NEEDS[prefix]}: pip install {_NEEDS[prefix]}") from error
    except Exception as error:  # four libraries, each with its own types
        if "install" in str(error):
            raise UserError(f"--data-set {name} needs {_NEEDS[prefix]}: pip install {_NEEDS[prefix]}") from error
        raise UserError(f"--data-set {name} cannot be read from {root}, split {split!r}: {error}") from error
    return data if prefix in _STREAMS else ReaderImages(data.reader, mode)


def _images(is_train: bool, args: Data) -> tuple[Any, int]:
    """PIL images of one split, or timm's stream of them, and the number of classes, 0 if the data does not state it."""
    name, split = args.data_set, "train" if is_train else "val"
    mode = "L" if args.in_chans == 1 else "RGB"
    if name not in DATA_SETS and not name.startswith(FACTORY_PREFIXES):
        raise UserError(
            f"--data-set is {name!r}, expected one of {', '.join(DATA_SETS)} or a name that begins with "
            f"{', '.join(FACTORY_PREFIXES)}"
        )
    if name == "FMNIST":
        folder = _folder(Path(args.data_path), "--data-path must be Fashion-MNIST's folder") if args.data_path else None
        return FashionMNIST(train=is_train, folder=folder, mode=mode, transform=None), 10
    if not args.data_path:
        raise UserError(f"--data-set {name} needs --data-path, the folder that holds it")
    root = Path(args.data_path)
    if name == "IMNET":
        _folder(root, _TWO_SPLITS)
        if args.eval and not any((root / s).is_dir() for s in ("train", "val")):
            # Sets for evaluation only, such as ImageNet-V2, -R, -A and -Sketch, come without splits.
            data = image_folder(root, mode)
        else:
            data = image_folder(root / split, mode)
        return data, len(data.classes)
    if name == "CLIPS":
        at_random = is_train and args.train_mode
        data, unread = clip_folder(_folder(root, _TWO_SPLITS) / split, mode, args.num_frames, at_random)
        _say_unread(root / split, unread)
        return data, len(data.classes)
    if name == "CIFAR":
        try:
            data = tv.CIFAR100(str(root), train=is_train, download=False)
        except RuntimeError as error:
            raise UserError(
                f"{root} does not hold CIFAR-100: unpack cifar-100-python.tar.gz of the original set into it"
            ) from error
        return (data if mode == "RGB" else _Grey(data, mode)), 100
    if name in ("INAT", "INAT19"):
        year = 2018 if name == "INAT" else 2019
        data = inaturalist(root, train=is_train, year=year, category=args.inat_category, mode=mode)
        return data, len(data.classes)
    data = _from_timm(name, root, is_train, args, mode)
    return data, len(getattr(data, "classes", ()))


def build_dataset(is_train: bool, args: Data) -> tuple[Samples | Stream, int]:
    """One split, with its transform, and its number of classes.

    Raises:
        UserError: unknown data set, missing data, or data that does not have the expected form.
    """
    limit_pixels(args.max_image_pixels)
    transform = (clip_transform if args.data_set == "CLIPS" else build_transform)(is_train, args)
    images, num_classes = _images(is_train, args)
    if num_classes and args.num_classes not in (0, num_classes) and not args.class_index:
        raise UserError(
            f"--num-classes is {args.num_classes} and the data set has {num_classes} classes: leave the flag out"
        )
    num_classes = num_classes or args.num_classes
    if not num_classes:
        raise UserError(f"--data-set {args.data_set} does not say how many classes it has: pass --num-classes")
    split = "training" if is_train else "evaluation"
    if args.data_set == "CLIPS" and args.cache:
        raise UserError("--cache keeps images in memory, and the frames of a clip change: leave it out with CLIPS")
    if args.data_set.startswith(_STREAMS):
        if args.cache:
            raise UserError(f"--cache keeps an indexed set in memory, and {args.data_set} is a stream: leave it out")
        mode = "L" if args.in_chans == 1 else "RGB"
        data: Samples | Stream = Stream(images, transform, is_train=is_train, args=args, mode=mode)
    elif len(images) == 0:
        raise UserError(f"the {split} split of --data-set {args.data_set} has no images: look at --data-path")
    else:
        data = Samples(images, transform, is_train=is_train, args=args)
    _logger.info("%s split: %d images in %d classes", split, len(images), num_classes)
    if num_classes == 1:
        _logger.warning("the %s split has a single class: there is nothing to tell apart", split)
    return data, num_classes


def build_datasets(args: Data) -> tuple[Samples | Stream | None, Samples | Stream, int]:
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
