"""Rectangles as --input-size HEIGHT WIDTH: training, evaluation, resuming, a change of size, a prediction."""

import json

import pytest
import torch

from vim.analysis import predict
from vim.engine import run

FLAGS = (
    "--model", "vim_nano_patch4_32", "--model-kwargs", "depth=1", "embed_dim=16", "--batch-size", "8", "--num_workers",
    "0", "--device", "cpu", "--trackers", "none", "--warmup-epochs", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    """Folder of a run of one epoch on images of 16 × 32 pixels."""
    folder = tmp_path_factory.mktemp("rectangles")
    flags = [*FLAGS, "--input-size", "16", "32", "--epochs", "1", "--data-path", str(tree), "--output_dir", str(folder)]
    assert run.main(flags) == 0
    return folder


def test_a_step_sees_images_of_that_shape(tree, tmp_path, monkeypatch):
    shapes = []
    whole = run.train_one_epoch.__globals__["_accumulate"]

    def watched(state, batches, *args):
        def noted():
            for images, targets in batches:
                shapes.append(tuple(images.shape[2:]))
                yield images, targets

        return whole(state, noted(), *args)

    monkeypatch.setattr("vim.engine.training._accumulate", watched)
    flags = [*FLAGS, "--input-size", "16", "32", "--epochs", "1", "--data-path", str(tree)]
    assert run.main([*flags, "--output_dir", str(tmp_path / "o")]) == 0
    assert set(shapes) == {(16, 32)}


def test_evaluation_is_that_of_the_run(trained, capsys):
    assert run.main(["--eval", "--resume", str(trained / "checkpoint.pth"), "--num_workers", "0"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    log = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    assert figures["test_images"] == 12
    # The same images in the same batches through the same weights.
    assert figures["test_loss"] == log["test_loss"]
    assert figures["ema_test_acc1"] == log["ema_test_acc1"]


def test_weights_go_on_in_another_shape(trained, tree, tmp_path, capsys):
    """--resume keeps a grid of 4 × 8 patches and refuses 8 × 4, though all shapes agree; --finetune resamples."""
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert checkpoint["grid"] == (4, 8)
    assert checkpoint["args"]["input_size"] == [16, 32]
    own = ["--resume", str(trained / "checkpoint.pth"), "--epochs", "2", "--device", "cpu", "--num_workers", "0"]
    assert run.main([*own, "--output_dir", str(tmp_path / "longer")]) == 0
    assert run.main([*own, "--input-size", "32", "16", "--output_dir", str(tmp_path / "turned")]) == 2
    error = capsys.readouterr().err
    assert "a grid of 4 × 8 patches and this run's is 8 × 4" in error
    assert "--finetune" in error
    flags = [*FLAGS, "--input-size", "32", "16", "--epochs", "1", "--data-path", str(tree), "--finetune"]
    assert run.main([*flags, str(trained / "checkpoint.pth"), "--output_dir", str(tmp_path / "turned")]) == 0
    turned = torch.load(tmp_path / "turned" / "checkpoint.pth", weights_only=True)
    assert turned["grid"] == (8, 4)


def test_prediction(trained, tree, tmp_path, capsys):
    image = next((tree / "val" / "red").iterdir())
    out = tmp_path / "panel.png"
    assert predict.main([str(image), "--checkpoint", str(trained / "checkpoint.pth"), "--out", str(out)]) == 0
    assert out.exists()
    assert "red" in capsys.readouterr().out
