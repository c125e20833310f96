"""Flags of a small model, and synthetic images."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vim.engine.arguments import parse_args

NANO = ("--model", "vim_nano_patch4_32", "--input-size", "32", "--batch-size", "4", "--num_workers", "0", "--device",
        "cpu", "--no-repeated-aug")  # fmt: skip


@pytest.fixture
def parsed():
    """Parse flags after those of a small model."""

    def parse(*argv) -> argparse.Namespace:
        return parse_args([*NANO, *map(str, argv)])

    return parse


@pytest.fixture
def colours(tmp_path) -> Path:
    """train/ and val/ with classes "blue", "green", "red": 4 and 2 JPEGs each, of pixels that name class and number.

    Channel k is bright for class k; the whole image's other channels are 10 times the image's number.
    """
    root = tmp_path / "colours"
    for split, count in (("train", 4), ("val", 2)):
        for k, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour_image(2 - k, i).save(root / split / name / f"{i}.jpg", quality=95)
    return root


def colour_image(channel: int, number: int) -> Image.Image:
    """40 × 48 pixels, 200 in this channel, ten times the number in the others."""
    pixels = np.full((40, 48, 3), 10 * number, dtype=np.uint8)
    pixels[..., channel] = 200
    return Image.fromarray(pixels)
