"""Fashion-MNIST (arXiv 1708.07747, MIT licence): the embedded subset, or the full set from a folder of idx files."""

import gzip
import zlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vim.errors import UserError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
_PREFIX = {"train": "train", "test": "t10k"}


def _read_idx(path: Path) -> np.ndarray:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read, it may be truncated: copy it again ({error})") from error
    # An idx file: two zero bytes, the type (8: unsigned byte), the number of dimensions, each as big-endian uint32.
    if len(data) < 4 or len(data) < 4 + 4 * data[3] or data[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an idx file of bytes: get the file of the original data set again")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path} is truncated: {values.size} bytes where its header says {tuple(shape.tolist())}")
    return values.reshape(shape)


def read_idx_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and labels (n,) uint8 of "train" or "test" from the original files, gzipped or not.

    Raises:
        UserError: a file is missing or not in the idx format.
    """
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        stem = folder / f"{_PREFIX[split]}-{kind}"
        path = next((p for p in (stem, stem.with_name(stem.name + ".gz")) if p.is_file()), None)
        if path is None:
            raise UserError(f"{stem}(.gz) is missing: --data-path must hold Fashion-MNIST's four idx files")
        arrays.append(_read_idx(path))
    images, labels = arrays
    if images.shape != (len(labels), 28, 28) or labels.shape != (len(images),) or (labels >= len(CLASSES)).any():
        raise UserError(
            f"the {_PREFIX[split]} files of {folder} hold images {images.shape} and labels {labels.shape} up to "
            f"{labels.max(initial=0)}, expected (n, 28, 28) and (n,) up to {len(CLASSES) - 1}: get the original files"
        )
    return images, labels


class FashionMNIST(Dataset):
    """Images as PIL, grey or RGB.

    Args:
        train: the training split, else the test split.
        folder: the full set's folder; None takes the embedded subset (1,000 and 200 images of each class).
        mode: "RGB" or "L".
        transform: applied to the image.
    """

    classes = CLASSES

    def __init__(
        self, *, train: bool, folder: Path | None, mode: str, transform: Callable[[Image.Image], Any] | None
    ) -> None:
        split = "train" if train else "test"
        if folder is None:
            with resources.files("vim.data").joinpath("fmnist_subset.npz").open("rb") as file, np.load(file) as archive:
                self.images, self.labels = archive[f"{split}_images"], archive[f"{split}_labels"]
        else:
            self.images, self.labels = read_idx_split(folder, split)
        self.mode, self.transform = mode, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])
