"""A synthetic ImageNet-style tree, and the command line as a process."""

import os
import subprocess
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """Three classes told apart by colour: 8 training and 4 test JPEGs of 40 × 48 pixels each."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for k, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
                pixels[..., 2 - k] += 150
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def run_main():
    """Run `main.py` from vim/ as a process, two threads, no GPU; gives the completed process."""

    def run(*argv: str, check: bool = True) -> subprocess.CompletedProcess:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
        done = forked.run("main.py", *argv, cwd=REPOSITORY / "vim", env=env)
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run
