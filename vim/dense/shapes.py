"""Make a small data set of overlapping coloured shapes, laid out as ADE20K and as COCO at once, for det/ and seg/.

    python scripts/make_shapes.py output/shapes

images/{training,validation}/NNNN.jpg
annotations/{training,validation}/NNNN.png     ADE20K's: 0 unlabelled, 1 background, 2 disc, 3 square, 4 triangle
classes.txt                                    names of ADE20K's labels 1 to 4, one a line
annotations/instances_{training,validation}.json   COCO's: boxes and masks of what is visible of each shape
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vim.errors import UserError, exit_status

CLASSES = ("disc", "square", "triangle")
# Red, green and blue of each class's middle; instances scatter around it, so colours of classes come close.
_COLOURS = np.array([[205, 90, 80], [90, 180, 100], [90, 110, 205]])
_SCATTER = 45
# A shape of which less than this many pixels are left visible is not annotated, nor drawn.
_MIN_VISIBLE = 60


def shape_mask(kind: int, size: int, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Boolean (size, size) mask of one shape.

    Args:
        kind: index into `CLASSES`.
        size: side of the image in pixels.
        centre: row and column of the middle.
        radius: of the disc, or of the circle around square and triangle.
        angle: turn in radians.
    """
    rows, columns = np.mgrid[:size, :size] + 0.5
    y, x = rows - centre[0], columns - centre[1]
    if kind == 0:
        return x**2 + y**2 <= (0.85 * radius) ** 2
    corners = {1: 4, 2: 3}[kind]
    directions = angle + 2 * np.pi * np.arange(corners) / corners
    # A regular polygon is where the distance along every side's normal stays below that of the side.
    inner = radius * np.cos(np.pi / corners)
    return np.all([x * np.cos(d) + y * np.sin(d) <= inner for d in directions], axis=0)


def make_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image (size, size, 3) uint8 and its shapes from back to front: class and visible mask."""
    slope = rng.uniform(-0.6, 0.6, (2, 3))
    rows, columns = np.mgrid[:size, :size]
    image = rng.uniform(60, 190) + rows[..., None] * slope[0] + columns[..., None] * slope[1]
    shapes: list[tuple[int, np.ndarray]] = []
    for _ in range(rng.integers(2, 5)):
        kind = int(rng.integers(len(CLASSES)))
        radius = rng.uniform(0.13, 0.26) * size
        mask = shape_mask(kind, size, rng.uniform(0.15, 0.85, 2) * size, radius, rng.uniform(0, 2 * np.pi))
        covered = [(k, m & ~mask) for k, m in shapes]
        if min([mask.sum(), *(m.sum() for _, m in covered)]) < _MIN_VISIBLE:
            continue
        shapes = [*covered, (kind, mask)]
        image[mask] = _COLOURS[kind] + rng.uniform(-_SCATTER, _SCATTER, 3)
    image += rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), shapes


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run-length code of a boolean mask: lengths of runs down the columns, zeros first."""
    flat = np.concatenate([[False], mask.flatten(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff(np.concatenate([[0], edges, [mask.size]]))
    if lengths[-1] == 0:
        lengths = lengths[:-1]
    return {"size": list(mask.shape), "counts": lengths.tolist()}


def write_split(
    folder: Path, split: str, content: Iterable[tuple[np.ndarray, list[tuple[int, np.ndarray]]]], classes: Sequence[str]
) -> None:
    """Write the images of a split with both kinds of annotation.

    Args:
        folder: of the data set.
        split: "training" or "validation".
        content: images (H, W, 3) uint8, each with its instances: index into `classes` and mask (H, W) bool.
        classes: names of the instances' classes; in the label maps the background comes before them.
    """
    for kind in ("images", "annotations"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, (pixels, instances) in enumerate(content):
        name = f"{i:04d}"
        Image.fromarray(pixels).save(folder / "images" / split / f"{name}.jpg", quality=95)
        labels = np.ones(pixels.shape[:2], np.uint8)
        height, width = labels.shape
        images.append({"id": i, "file_name": f"{name}.jpg", "height": height, "width": width})
        for kind, mask in instances:
            labels[mask] = kind + 2
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": i,
                "category_id": kind + 1,
                "bbox": [int(v) for v in box],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": run_lengths(mask),
            })  # fmt: skip
        Image.fromarray(labels).save(folder / "annotations" / split / f"{name}.png")
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    notes = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "classes.txt").write_text("\n".join(("background", *classes)) + "\n")
    # Last: who finds this file finds the rest of its split.
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(notes))


def write(folder: Path, train: int = 240, val: int = 60, size: int = 96, seed: int = 0) -> None:
    """Write the whole data set into a folder.

    Args:
        folder: of the data set; made if it is missing.
        train: number of training images.
        val: number of validation images.
        size: side in pixels.
        seed: of the random numbers.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for i, (split, count) in enumerate((("training", train), ("validation", val))):
            rng = np.random.default_rng([seed, i])
            write_split(folder, split, (make_image(rng, size) for _ in range(count)), CLASSES)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, or 2 if the folder cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=240, help="training images (240)")
    parser.add_argument("--val", type=int, default=60, help="validation images (60)")
    parser.add_argument("--size", type=int, default=96, help="side in pixels (96)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.size < 48 or min(args.train, args.val) < 1:
        parser.error("expected --size of 48 or more, and at least one image in each split")
    return exit_status(partial(write, args.folder, args.train, args.val, args.size, args.seed))
