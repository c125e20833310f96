"""What the tests of det/ and seg/ share. They need the OpenMMLab packages (bash scripts/install_openmmlab.sh): without
them every test here fails and says so, rather than being skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("downstream")


@pytest.fixture(scope="session", autouse=True)
def _stack():
    from vim.dense.stack import require_stack
    from vim.errors import UserError

    try:
        require_stack("mmdet", "mmseg")
    except UserError as error:
        pytest.fail(str(error), pytrace=False)
    import vim.dense.register  # noqa: F401


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """The synthetic data set, in the layouts of ADE20K and COCO."""
    folder = tmp_path_factory.mktemp("shapes")
    subprocess.run([sys.executable, ROOT / "scripts" / "make_shapes.py", folder], check=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A function: registered name → a file laid out as the published checkpoints are, with weights of that model."""
    import argparse

    import timm

    folder, files = tmp_path_factory.mktemp("published"), {}

    def make(arch: str) -> Path:
        if arch not in files:
            torch.manual_seed(0)
            files[arch] = folder / f"{arch}.pth"
            content = {"model": timm.create_model(arch).state_dict(), "args": argparse.Namespace(lr=1e-3), "epoch": 299}
            torch.save(content, files[arch])
        return files[arch]

    return make


@pytest.fixture(scope="session")
def run_tool():
    """A function: path under the repository and arguments → the completed process."""
    forked.preload("vim.dense.register", "mmdet.models", "mmseg.models")

    def run(script: str, *argv: object, timeout: float = 1500) -> subprocess.CompletedProcess:
        return forked.run(ROOT / script, *argv, cwd=ROOT, env=os.environ, timeout=timeout)

    return run


class Trained:
    """A finished run: its folder, and what it logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = []
        for file in sorted(folder.glob("*/vis_data/scalars.json")):
            lines += [json.loads(line) for line in file.read_text().splitlines()]
        # Losses are logged with their iteration, metrics with the validation's step.
        self.losses = {line["iter"]: line["loss"] for line in lines if "loss" in line}
        self.rates = {line["iter"]: line["lr"] for line in lines if "loss" in line}
        self.metrics = {k: v for line in lines if "loss" not in line for k, v in line.items()}

    def checkpoint(self, iteration: int) -> Path:
        return self.folder / f"iter_{iteration}.pth"


@pytest.fixture(scope="session")
def train_shapes(shapes, tmp_path_factory, run_tool):
    """A function: task and further flags → `Trained` on the shapes by the nano config, seed 0."""
    configs = {
        "seg": "seg/configs/upernet_vim-nano_shapes.py",
        "det": "det/configs/mask-rcnn_vim-nano_shapes.py",
    }

    def train(task: str, *flags: object) -> Trained:
        folder = tmp_path_factory.mktemp(f"{task}-run")
        done = run_tool(
            f"{task}/train.py", configs[task], "--data-root", shapes, "--work-dir", folder, "--seed", 0, *flags
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return Trained(folder)

    train.configs = configs
    return train


@pytest.fixture(scope="session")
def trained_seg(train_shapes) -> Trained:
    return train_shapes("seg")


@pytest.fixture(scope="session")
def trained_det(train_shapes) -> Trained:
    return train_shapes("det")
