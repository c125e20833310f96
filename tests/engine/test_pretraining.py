"""`--pretrain arm`: a run without labels, its resumption, and the fine-tuning of what it leaves."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vim.engine.run import main, run
from vim.models import load_checkpoint
from vim.models.masked import MaskedPretraining

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


MASKED = ["--model", "fastvim_tiny_patch16_224", "--model-kwargs", "patch_size=4", "embed_dim=16", "depth=2",
          "pad_patches=False", "--input-size", "24", "--in-chans", "1"]  # fmt: skip


def test_masked_pretraining_and_finetuning(folder: Path, tmp_path: Path) -> None:
    data = [*PLAIN, "--data-path", str(folder)]
    record = run([*MASKED, *data, "--pretrain", "masked", "--epochs", "1", "--output-dir", str(tmp_path / "pt")])
    assert 0.5 < record["test_loss"] < 2
    pretrained = load_checkpoint(tmp_path / "pt" / "checkpoint.pth")["model"]
    still = ["--lr", "0", "--unscale-lr", "--warmup-lr", "0", "--min-lr", "0", "--epochs", "1"]
    tuned = ["--finetune", str(tmp_path / "pt" / "checkpoint.pth"), "--output-dir", str(tmp_path / "tuned")]
    run([*MASKED, *data, *still, *tuned])
    state = load_checkpoint(tmp_path / "tuned" / "checkpoint.pth")["model"]
    assert all(torch.equal(tensor, pretrained[f"backbone.{name}"]) for name, tensor in state.items())


def test_masked_loss() -> None:
    """Blank patches alone count; their pixels reach neither the encoder nor, through it, the prediction."""
    torch.manual_seed(0)
    backbone = timm.create_model("vim_nano_patch4_32", depth=2, img_size=16, in_chans=1)
    model = MaskedPretraining(backbone).eval()
    x = torch.randn(2, 1, 16, 16)
    mask = model.mask(x)
    assert mask.sum(1).tolist() == [10, 10]  # 60 % of 16, rounded
    assert torch.equal(model.patches(x)[0, 5], x[0, 0, 4:8, 4:8].flatten())
    assert model(x).shape == (2, 10)
    with torch.no_grad():
        model.predict.weight.zero_()
        model.predict.bias.zero_()
    # Nothing predicted: the mean square of values with unbiased variance 1, times 15 / 16.
    torch.testing.assert_close(model(x), torch.full((2, 10), 15 / 16), rtol=0, atol=1e-4)
    seen = x.clone().requires_grad_()
    blank = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    backbone.forward_features(seen.masked_fill(blank, 0.0)).square().sum().backward()
    assert (seen.grad[blank] == 0).all()
    assert (seen.grad[~blank] != 0).any()
    model.train()
    assert not torch.equal(model.mask(x), model.mask(x))
    with pytest.raises(ValueError, match="neither overlap"):
        MaskedPretraining(timm.create_model("vim_nano_patch4_stride2_32", depth=1))


@pytest.mark.parametrize(("more", "words"), [
    (["--model", "vim_nano_patch4_32", "--model-kwargs", "depth=2"], "ARM's models, and vim_nano_patch4_32 is none"),
    (["--input-size", "28"], "must be (24, 24), got (28, 28)"),
    (["--decoder-dim", "60"], "multiple of 64"),
    (["--eval", "--resume", "a.pth"], "--eval measures a classifier"),
    (["--pretrain", "masked", "--model", "resnet18", "--model-kwargs", "cardinality=1"], "for Vision Mamba models"),
    (["--pretrain", "jepa"], "--pretrain is 'jepa', expected one of none, arm, masked"),
])  # fmt: skip
def test_refusals(folder: Path, more: list[str], words: str, capsys) -> None:
    assert main([*PRETRAIN, "--data-path", str(folder), "--epochs", "1", *more]) == 2
    assert words in capsys.readouterr().err
