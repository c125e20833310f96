"""A synthetic ImageNet tree of a few small JPEGs, and models that are trained on it."""

import numpy as np
import pytest
from PIL import Image

from vim.engine import run


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


@pytest.fixture(scope="session")
def train_small(jpegs, tmp_path_factory):
    """Trains a model of some blocks for an epoch on the JPEGs; gives its checkpoint."""

    def train(depth: int):
        folder = tmp_path_factory.mktemp("run")
        run.run([
            "--model", "vim_nano_patch4_32", "--model-kwargs", f"depth={depth}", "--input-size", "32", "--batch-size",
            "2", "--num_workers", "0", "--device", "cpu", "--epochs", "1", "--aa", "none", "--no-repeated-aug",
            "--no-model-ema", "--data-path", str(jpegs), "--output_dir", str(folder),
        ])  # fmt: skip
        return folder / "checkpoint.pth"

    return train
