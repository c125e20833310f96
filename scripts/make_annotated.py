"""Write the annotated photographs that two packages carry as data sets for det/ and seg/.

    pip install --no-deps stardist imgaug      # data alone: neither is imported
    python scripts/make_annotated.py output

output/nuclei    a fluorescence micrograph of 125 cell nuclei, annotated by experts (stardist; of the Data Science Bowl
                 2018), in 16 tiles of 128 × 128: the left 12 for training, the right 4 for validation
output/quokka    a photograph of a quokka with its outline (imgaug), at a third of its size, both for training and
                 validation
"""

import argparse
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vim.dense.shapes import write_split
from vim.errors import UserError, exit_status

_TILE = 128
# Nuclei that a cut leaves fewer pixels of are not annotated.
_MIN_PIXELS = 20


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def write_nuclei(folder: Path) -> None:
    """Write the tiles of the micrograph.

    Args:
        folder: of the data set.

    Raises:
        UserError: the package is missing.
    """
    source = _folder_of("stardist") / "data" / "images"
    image, labels = (np.asarray(Image.open(source / name)) for name in ("img2d.tif", "mask2d.tif"))
    low, high = np.percentile(image, (1, 99.8))
    grey = (255 * ((image - low) / (high - low)).clip(0, 1)).astype(np.uint8)
    splits: dict[str, list] = {"training": [], "validation": []}
    for top in range(0, image.shape[0], _TILE):
        for left in range(0, image.shape[1], _TILE):
            at = (slice(top, top + _TILE), slice(left, left + _TILE))
            masks = [labels[at] == number for number in np.unique(labels[at]) if number]
            instances = [(0, mask) for mask in masks if mask.sum() >= _MIN_PIXELS]
            last = left + _TILE == image.shape[1]
            splits["validation" if last else "training"].append((np.stack([grey[at]] * 3, -1), instances))
    for split, content in splits.items():
        write_split(folder, split, content, ["nucleus"])


def write_quokka(folder: Path) -> None:
    """Write the photograph, as both splits.

    Args:
        folder: of the data set.

    Raises:
        UserError: the package is missing.
    """
    source = _folder_of("imgaug")
    image = Image.open(source / "quokka.jpg").convert("RGB")
    outline = json.loads((source / "quokka_annotations.json").read_text())["polygons"][0]["keypoints"]
    mask = Image.new("1", image.size)
    ImageDraw.Draw(mask).polygon([(point["x"], point["y"]) for point in outline], fill=1)
    size = (image.width // 3, image.height // 3)
    pixels, inside = np.asarray(image.resize(size, Image.Resampling.BICUBIC)), np.asarray(mask.resize(size))
    for split in ("training", "validation"):
        write_split(folder, split, [(pixels, [(0, inside)])], ["quokka"])


def _write(folder: Path) -> None:
    try:
        write_nuclei(folder / "nuclei")
        write_quokka(folder / "quokka")
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read or written: {error.strerror or error}") from error


def main(argv: list[str] | None = None) -> int:
    """Command line: its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    return exit_status(partial(_write, parser.parse_args(argv).folder))


if __name__ == "__main__":
    sys.exit(main())
