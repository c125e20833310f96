"""`--pretrain arm`: a run without labels, its resumption, and the fine-tuning of what it leaves."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim.engine.run import main, run
from vim.models import load_checkpoint

SIZES = ["--model", "arm_base_patch16_224", "--model-kwargs", "patch_size=2", "embed_dim=16", "depth=12",
         "--input-size", "24", "--in-chans", "1"]  # fmt: skip
PLAIN = ["--device", "cpu", "--num-workers", "0", "--batch-size", "4", "--no-repeated-aug", "--no-model-ema",
         "--mixup", "0", "--cutmix", "0", "--warmup-epochs", "0", "--aa", "none", "--eval-crop-ratio", "1"]  # fmt: skip
PRETRAIN = [*SIZES, *PLAIN, "--pretrain", "arm", "--decoder-dim", "64", "--lr", "1e-3", "--unscale-lr"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("a", "b"):
            path = tmp_path / "images" / split / name
            path.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8)).save(path / f"{i}.png")
    return tmp_path / "images"


def test_pretrain_resume_finetune(folder: Path, tmp_path: Path) -> None:
    data = ["--data-path", str(folder)]
    once = run([*PRETRAIN, *data, "--epochs", "2", "--output-dir", str(tmp_path / "whole")])
    assert once["test_images"] == 6
    assert once["best_loss"] <= once["test_loss"]
    # Targets have unit variance, so that predicting nothing costs 1 (the unbiased variance: a little less).
    assert 0.5 < once["test_loss"] < 1.2
    run([*PRETRAIN, *data, "--epochs", "1", "--output-dir", str(tmp_path / "parts")])
    parts = run([*PRETRAIN, *data, "--epochs", "2", "--output-dir", str(tmp_path / "parts"), "--resume", "auto"])
    assert math.isfinite(parts["best_loss"])
    pretrained = load_checkpoint(tmp_path / "whole" / "checkpoint.pth")["model"]
    assert "enc2dec.weight" in pretrained
    tuned = ["--finetune", str(tmp_path / "whole" / "checkpoint.pth"), "--epochs", "1", "--lr", "0", "--unscale-lr",
             "--warmup-lr", "0", "--min-lr", "0", "--output-dir", str(tmp_path / "tuned")]  # fmt: skip
    record = run([*SIZES, *PLAIN, *data, *tuned])
    assert 0 <= record["test_acc1"] <= 100
    state = load_checkpoint(tmp_path / "tuned" / "checkpoint.pth")["model"]
    for suffix in ("", "_b", "_c", "_c_b"):
        assert torch.equal(state[f"layers.3.mixer.x_proj{suffix}.weight"], pretrained["layers.3.mixer.x_proj.weight"])
        assert torch.equal(state[f"layers.3.mixer.A{suffix}_log"], pretrained["layers.3.mixer.A_log"])
    assert torch.equal(state["layers.3.mlp.w1.weight"], pretrained["layers.3.mlp.w1.weight"])


@pytest.mark.parametrize(("more", "words"), [
    (["--model", "vim_nano_patch4_32", "--model-kwargs", "depth=2"], "ARM's models, and vim_nano_patch4_32 is none"),
    (["--input-size", "28"], "must be (24, 24), got (28, 28)"),
    (["--decoder-dim", "60"], "multiple of 64"),
    (["--eval", "--resume", "a.pth"], "--eval measures a classifier"),
    (["--pretrain", "jepa"], "invalid choice: 'jepa'"),
])  # fmt: skip
def test_refusals(folder: Path, more: list[str], words: str, capsys) -> None:
    assert main([*PRETRAIN, "--data-path", str(folder), "--epochs", "1", *more]) == 2
    assert words in capsys.readouterr().err
