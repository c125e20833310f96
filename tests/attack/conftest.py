"""Attacks on files, folders and processes: minutes in all, so every test in this folder is marked slow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """Three classes told apart by colour: 8 training and 4 test JPEGs of 40 × 48 pixels each."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for k, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
                pixels[..., 2 - k] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root
