"""`scripts/predict.sh`: names and probabilities against a model built without the engine, the drawn panel, refusals."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torchvision import transforms

from vim.analysis.predict import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "predict.sh"


@pytest.fixture(scope="module")
def checkpoint(train_small):
    return train_small(depth=1)


def probabilities(model, path):
    picture = transforms.Compose(
        [
            transforms.Resize(36, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )(Image.open(path).convert("RGB"))
    with torch.no_grad():
        return model.eval()(picture[None]).softmax(1)[0]


def test_names_and_probabilities(checkpoint, jpegs, tmp_path):
    pictures = sorted(jpegs.glob("val/*/*.jpg"))
    env = {**os.environ, "CKPT": str(checkpoint), "OUTPUT": str(tmp_path / "panel.png"), "PYTHON": sys.executable}
    done = subprocess.run(["bash", SCRIPT, *pictures], env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    model = timm.create_model("vim_nano_patch4_32", depth=1, num_classes=3)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    expected = []
    for path in pictures:
        values, order = probabilities(model, path).sort(descending=True)
        expected += [str(path), *(f"  {v:6.1%}  {'abc'[k]}" for v, k in zip(values.tolist(), order, strict=True))]
    assert done.stdout.splitlines() == [*expected, f"drawn in {tmp_path / 'panel.png'}"]
    width, height = Image.open(tmp_path / "panel.png").size
    assert width > height > 300


def test_published_files_have_imagenets_names(jpegs, tmp_path, capsys):
    """The model's name from the flags in the file, the classes' from ImageNet."""
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", num_classes=1000)
    torch.nn.init.normal_(model.head.weight)
    path, picture = tmp_path / "published.pth", next(jpegs.glob("val/*/*.jpg"))
    flags = argparse.Namespace(model="vim_nano_patch4_32", lr=1.0)
    torch.save({"model": model.state_dict(), "args": flags}, path)
    out = ["--out", str(tmp_path / "panel.png")]
    assert main([str(picture), "--checkpoint", str(path), *out]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {ImageNetInfo().index_to_description(k).split(",")[0] for k in range(1000)}
    assert len(lines) == 7
    assert all(line[10:] in names for line in lines[1:6])
    torch.save({"model": model.state_dict()}, path)
    assert main([str(picture), "--checkpoint", str(path), *out]) == 2
    assert "does not name its model: pass --model" in capsys.readouterr().err


def test_what_cannot_be_predicted_is_said(checkpoint, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (40, 50)).save(tmp_path / "large.png")
    for name, words in (
        ("text.jpg", "text.jpg cannot be read as an image"), ("absent.png", "absent.png cannot be read"),
        ("float.tif", "float.tif has mode F"), ("large.png", "more pixels than --max-image-pixels"),
    ):  # fmt: skip
        argv = [str(tmp_path / name), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "panel.png")]
        assert main([*argv, "--max-image-pixels", "1999"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
    assert not (tmp_path / "panel.png").exists()
    done = subprocess.run(["bash", SCRIPT], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: give an image: bash scripts/predict.sh IMAGE...\n")
    env = {**os.environ, "CKPT": str(tmp_path / "absent.pth")}
    done = subprocess.run(["bash", SCRIPT, "x.png"], env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    assert "there is no checkpoint at" in done.stderr
