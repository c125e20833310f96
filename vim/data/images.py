"""From a data set of undecoded or decoded images to samples: bad images, the cache in memory, the transform."""

import logging
import os
import struct
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from vim.environment import number
from vim.errors import UserError
from vim.flags import Common, Data

# Not the engine's logger, which is silent in all processes but the first: every process may meet other bad images.
_logger = logging.getLogger("vision_mamba.data")

# This many bad images in a row are not an accident.
_MOST_IN_A_ROW = 100
# Target of an image that evaluation leaves out.
LEFT_OUT = -1


class BadImageError(UserError):
    """An image that cannot be read."""


def limit_pixels(most: int) -> None:
    """Let Pillow refuse images of more pixels than this, in this process."""
    # Pillow warns of more pixels than its limit and refuses twice as many.
    Image.MAX_IMAGE_PIXELS = most / 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(source: str | Path | IO[bytes], mode: str, name: str = "") -> Image.Image:
    """An image of this mode ("RGB" or "L") from a path or an open file, read to its end.

    Raises:
        BadImageError: it cannot be read as an image of 8 bits; the message holds its name.
    """
    name = name or str(source)
    try:
        with Image.open(source) as image:
            return eight_bits(image, mode, name)
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{name} has more pixels than --max-image-pixels allows") from error
    # What Pillow raises for damaged files, besides OSError, the parent of UnidentifiedImageError; and cut archives.
    except (
        UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, struct.error, MemoryError, tarfile.TarError
    ) as error:  # fmt: skip
        raise BadImageError(f"{name} cannot be read as an image ({type(error).__name__})") from error


def eight_bits(image: Image.Image, mode: str, name: str) -> Image.Image:
    """An image in mode "RGB" or "L": 16 bits scaled to 8, transparency left out, palettes looked up.

    Raises:
        BadImageError: the range of its values is unknown, as that of floating-point numbers is.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow itself would cut values at 255, or drop the lower byte without rounding.
        pixels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit whole" if image.mode == "I" else "floating-point"
        raise BadImageError(
            f"{name} has mode {image.mode}, {kind} numbers of unknown range: convert it to 8 or 16 bits per channel"
        )
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    try:
        return image.convert(mode)
    except ValueError as error:
        raise BadImageError(f"{name} has mode {image.mode}, which cannot be converted to {mode}") from error


def sample_shape(args: Common) -> tuple[int, ...]:
    """Shape of a transformed sample: (channels, height, width), of a clip (channels, frames, height, width)."""
    frames = (args.num_frames,) if args.data_set == "CLIPS" else ()
    return (args.in_chans, *frames, *args.image_size)


class Samples(Dataset):
    """Transformed images and class numbers of a map-style data set of PIL images.

    A bad image stops the run, or is counted, logged once and replaced by the next good one of the data set; an
    evaluation set leaves it out instead (its target is `LEFT_OUT`), so that its figures are those of real images.

    Args:
        images: indexed to (PIL image, class number); raises BadImageError. Its `classes`, if any, are passed on.
        transform: PIL image → tensor.
        is_train: a training set.
        args: parsed flags (`on_bad_image`, `cache`, and the image's size).
    """

    def __init__(
        self, images: Dataset, transform: Callable[[Image.Image], torch.Tensor], *, is_train: bool,
        args: Data,
    ) -> None:  # fmt: skip
        self.images, self.transform, self.is_train = images, transform, is_train
        self.policy = args.on_bad_image
        self._shape = sample_shape(args)
        if hasattr(images, "classes"):
            self.classes = list(images.classes)
        # Shared between workers and the main process, which counts them.
        self._bad = torch.zeros(len(images), dtype=torch.uint8).share_memory_()
        self._numbers: list[int] | None = None
        self._cache: list[np.ndarray | None] | None = None
        self._targets: list[int] = []
        if args.cache:
            self._fill_cache()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        for tried in range(min(len(self), _MOST_IN_A_ROW)):
            at = (index + tried) % len(self)
            try:
                image, target = self._image(at)
            except BadImageError as error:
                self._note(at, error)
                if not self.is_train:
                    return torch.zeros(self._shape, dtype=torch.float32, device="cpu"), LEFT_OUT
                continue
            return self.transform(image), target if self._numbers is None else self._numbers[target]
        raise UserError(f"{_MOST_IN_A_ROW} images in a row cannot be read: look at the lines of the log that name them")

    def relabel(self, numbers: list[int], classes: list[str]) -> None:
        """Renumber the classes of the set by their position in `classes`."""
        self._numbers, self.classes = numbers, classes

    def bad_images(self) -> torch.Tensor:
        """Marks of the images that this process and its workers could not read so far: (n,) uint8, 1 or 0."""
        return self._bad.clone()

    def _note(self, index: int, error: BadImageError) -> None:
        if self.policy == "stop":
            raise UserError(
                f"{error}: replace or remove it, or go on without such images by --on-bad-image replace"
            ) from error
        if not self._bad[index]:
            self._bad[index] = 1
            _logger.warning("%s; %s", error, "another takes its place" if self.is_train else "it is left out")

    def _image(self, index: int) -> tuple[Image.Image, int]:
        if self._cache is not None and (pixels := self._cache[index]) is not None:
            return Image.fromarray(pixels), self._targets[index]
        return self.images[index]

    def _fill_cache(self) -> None:
        """Decode every image into memory before workers start, which share the pages because they are not written."""
        limit = free_memory() // 2 // number("LOCAL_WORLD_SIZE", 1, 1, 10**6)
        used, begun = 0, time.perf_counter()
        cache: list[np.ndarray | None] = [None] * len(self)
        targets = [LEFT_OUT] * len(self)

        def load(index: int) -> None:
            nonlocal used
            if used > limit:
                return
            try:
                image, targets[index] = self.images[index]
            except BadImageError as error:
                self._note(index, error)
                return
            cache[index] = pixels = np.asarray(image)
            used += pixels.nbytes

        with ThreadPoolExecutor() as pool:
            list(pool.map(load, range(len(self))))
        if used > limit:
            raise UserError(
                f"--cache: the images take more than {limit / 2**30:.1f} GiB, half of this process's share of the free "
                "memory: leave --cache out"
            )
        self._cache, self._targets = cache, targets
        _logger.info("%d images in memory: %.1f MB, read in %.1f s", len(self), used / 1e6, time.perf_counter() - begun)


def free_memory() -> int:
    """Bytes that can be taken without swapping; all of the memory, or no bound, where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        if not hasattr(os, "sysconf"):  # Windows
            return sys.maxsize
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
