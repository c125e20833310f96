"""A synthetic ImageNet tree of a few small JPEGs."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory):
    """Three classes of small JPEGs in ImageNet's layout: 2 training images and 1 test image of each."""
    root = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (60, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root
