"""Make a small data set of moving shapes for `--data-set CLIPS`: the class is the direction of the movement.

python scripts/make_clips.py output/clips

{train,val}/{down,left,right,up}/NNNN.webp: grey animations of a disc, a square or a triangle over noise. Frames
without their order do not tell the class.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vim.dense.shapes import shape_mask

DIRECTIONS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}


def make_clip(rng: np.random.Generator, direction: str, size: int, frames: int) -> np.ndarray:
    """(frames, size, size) uint8: one shape that moves across the middle."""
    kind, radius, angle = int(rng.integers(3)), rng.uniform(0.15, 0.25) * size, rng.uniform(0, 2 * np.pi)
    # From the middle of the movement on both sides, so that frames without their order do not tell left from right.
    way, middle_at = rng.uniform(0.4, 0.8) * size, rng.uniform(-0.15, 0.15, 2) * size
    light, dark = rng.uniform(150, 230), rng.uniform(20, 90)
    clip = rng.normal(dark, 8, (frames, size, size))
    middle = shape_mask(kind, size, np.full(2, size / 2), radius, angle)
    for t in range(frames):
        shift = middle_at + way * ((t + 0.5) / frames - 0.5) * np.array(DIRECTIONS[direction])
        clip[t][np.roll(middle, tuple(shift.round().astype(int)), axis=(0, 1))] = light
    return clip.clip(0, 255).astype(np.uint8)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--train", type=int, default=1200, help="training clips")
    parser.add_argument("--val", type=int, default=400, help="evaluation clips")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shapes")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    names = list(DIRECTIONS)
    for split, count in (("train", args.train), ("val", args.val)):
        for name in names:
            (args.folder / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            name = names[i % len(names)]
            first, *rest = (Image.fromarray(f) for f in make_clip(rng, name, args.size, args.frames))
            path = args.folder / split / name / f"{i:04d}.webp"
            first.save(path, save_all=True, append_images=rest, lossless=True, duration=100)
    print(f"{args.train} training and {args.val} evaluation clips in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
