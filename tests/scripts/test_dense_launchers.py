"""Launchers of detection and segmentation: the commands they print, what they refuse; the synthetic data set."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = sorted(p.name for p in SCRIPTS.glob("*-vim-?-*.sh"))
VARIABLES = ("DATA", "OUTPUT", "GPUS", "NODES", "FINETUNE", "CKPT", "CONFIG")


def run(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    env |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(["bash", SCRIPTS / script, *argv], env=env, text=True, capture_output=True, timeout=300)


def test_all_launchers_are_there():
    sizes = {"upernet": "ts", "det": "tsb"}
    expected = [f"{kind}-vim-{z}-{task}.sh" for task in sizes for kind in ("ft", "eval") for z in sizes[task]]
    assert sorted(expected) == LAUNCHERS


@pytest.mark.parametrize("script", LAUNCHERS)
def test_dry_run(script, tmp_path):
    done = run(script, "--dry-run", "--seed", "5", DATA=str(tmp_path), FINETUNE="a.pth", CKPT="b.pth", GPUS="4")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert "--nproc-per-node=4" in command
    assert command[command.index("--launcher") + 1] == "pytorch"
    assert command[command.index("--data-root") + 1] == str(tmp_path)
    assert command[-2:] == ["--seed", "5"]
    tool, config = next((c, command[i + 1]) for i, c in enumerate(command) if c.endswith(("train.py", "test.py")))
    assert (SCRIPTS.parent / tool).is_file()
    assert (SCRIPTS.parent / config).is_file()
    assert f"vim-{script.split('-')[2]}" in config
    checkpoint = (
        command[command.index("--finetune") + 1] if script.startswith("ft") else command[command.index(config) + 1]
    )
    assert Path(checkpoint).name == ("a.pth" if script.startswith("ft") else "b.pth")


@pytest.mark.parametrize("script", LAUNCHERS)
def test_missing_data_is_said(script):
    done = run(script, "--dry-run", FINETUNE="a.pth", CKPT="b.pth")
    assert done.returncode == 2
    assert "DATA is not set" in done.stderr


@pytest.mark.parametrize(("script", "variable"), [("ft-vim-t-upernet.sh", "FINETUNE"), ("eval-vim-b-det.sh", "CKPT")])
def test_missing_checkpoint_is_said(script, variable, tmp_path):
    done = run(script, "--dry-run", DATA=str(tmp_path))
    assert done.returncode == 2
    assert f"{variable} is not set" in done.stderr


def test_hub_ids_stay_as_they_are(tmp_path):
    done = run("ft-vim-t-det.sh", "--dry-run", DATA=str(tmp_path), FINETUNE="hf-hub:hustvl/Vim-tiny-midclstok/a.pth")
    assert "hf-hub:hustvl/Vim-tiny-midclstok/a.pth" in shlex.split(done.stdout)


@pytest.mark.parametrize("script", ["demo_seg.sh", "demo_det.sh"])
def test_demo_needs_a_picture(script, tmp_path):
    assert "give an image" in run(script).stderr
    done = run(script, str(tmp_path / "none.jpg"))
    assert done.returncode == 2
    assert "give an image" in done.stderr


def test_shapes_agree_in_both_layouts(tmp_path):
    def make(folder: Path) -> None:
        command = [sys.executable, SCRIPTS / "make_shapes.py", folder, "--train", "6", "--val", "2", "--size", "64"]
        subprocess.run(command, check=True)

    make(tmp_path / "a")
    make(tmp_path / "b")
    for split, count in (("training", 6), ("validation", 2)):
        content = json.loads((tmp_path / "a" / "annotations" / f"instances_{split}.json").read_text())
        assert content == json.loads((tmp_path / "b" / "annotations" / f"instances_{split}.json").read_text())
        assert len(content["images"]) == count
        for image in content["images"]:
            name = Path(image["file_name"]).stem
            picture = Image.open(tmp_path / "a" / "images" / split / f"{name}.jpg")
            labels = np.array(Image.open(tmp_path / "a" / "annotations" / split / f"{name}.png"))
            assert picture.size == (64, 64)
            rebuilt = np.ones_like(labels)
            for a in content["annotations"]:
                if a["image_id"] != image["id"]:
                    continue
                runs = a["segmentation"]["counts"]
                mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(64, 64).T.astype(bool)
                assert mask.sum() == a["area"]
                x, y, width, height = a["bbox"]
                assert mask[y : y + height, x : x + width].sum() == a["area"]
                assert mask[y].any()
                assert mask[:, x + width - 1].any()
                assert (rebuilt[mask] == 1).all(), "visible parts do not overlap"
                rebuilt[mask] = a["category_id"] + 1
            assert (rebuilt == labels).all()
