"""main.py end to end as processes: train, evaluate, resume, fine-tune."""

import json

import pytest
import torch

SMALL = ("--model", "vim_nano_patch4_32", "--input-size", "32", "--batch-size", "8", "--num_workers", "0")
RECIPE = ("--warmup-epochs", "0", "--lr", "0.05", "--aa", "none", "--seed", "3", "--no-repeated-aug")


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def trained(tree, run_main, tmp_path_factory):
    """Folder of a finished run of two epochs of three steps."""
    output = tmp_path_factory.mktemp("run")
    done = run_main(*SMALL, *RECIPE, "--data-path", tree, "--output_dir", output, "--epochs", "2")
    assert "running on the CPU" in done.stderr
    return output


def test_train_leaves_log_checkpoints_and_config(trained):
    records = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1]
    assert all(r["train_loss"] > 0 and 0 <= r["test_acc1"] <= 100 for r in records)
    assert {"checkpoint.pth", "config.yaml", "log.txt", "tensorboard"} <= {p.name for p in trained.iterdir()}
    assert any((trained / "tensorboard").iterdir())
    assert not [p for p in trained.iterdir() if p.name.startswith(".")]


def test_eval_prints_what_training_did(trained, run_main):
    done = run_main("--eval", "--resume", trained / "checkpoint.pth")
    last = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["test_acc1"] == last["test_acc1"]
    assert printed["test_loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    assert "ema_test_acc1" in printed


def test_resume_gives_the_same_bits(trained, tree, run_main, tmp_path):
    """One epoch, then a second by --resume, equal two epochs at once, in every weight; also with loader workers."""
    args = [*SMALL, *RECIPE, "--data-path", tree, "--output_dir", tmp_path, "--epochs", "2"]
    # A schedule of two epochs, stopped after the first.
    (tmp_path / "one").mkdir()
    run_main(*args[:-1], "1", "--output_dir", tmp_path / "one")
    saved = torch.load(tmp_path / "one" / "checkpoint.pth", weights_only=True)
    saved["lr_scheduler"]["t_initial"] = 2
    torch.save(saved, tmp_path / "checkpoint.pth")
    run_main(*args, "--resume", "auto", "--num_workers", "2")
    expected, actual = weights(trained / "checkpoint.pth"), weights(tmp_path / "checkpoint.pth")
    assert all(torch.equal(expected[k], actual[k]) for k in expected)


def test_finetune_to_finer_patches_and_another_head(trained, tree, run_main, tmp_path):
    import shutil

    two = tmp_path / "two_classes"
    for split in ("train", "val"):
        for name in ("blue", "red"):
            shutil.copytree(tree / split / name, two / split / name)
    done = run_main(
        *SMALL, *RECIPE, "--model", "vim_nano_patch4_stride2_32", "--finetune", trained / "checkpoint.pth",
        "--data-path", two, "--output_dir", tmp_path / "out", "--epochs", "1",
    )  # fmt: skip
    assert "the data has 2 of the checkpoint's 3 classes: matched by name" in done.stderr
    assert weights(tmp_path / "out" / "checkpoint.pth")["head.weight"].shape[0] == 2
    assert weights(tmp_path / "out" / "checkpoint.pth")["pos_embed"].shape == (1, 226, 64)


def test_config_replays_a_run(trained, run_main, tmp_path):
    run_main("--config", trained / "config.yaml", "--output_dir", tmp_path)
    expected, actual = weights(trained / "checkpoint.pth"), weights(tmp_path / "checkpoint.pth")
    assert all(torch.equal(expected[k], actual[k]) for k in expected)


def test_published_checkpoint_evaluates(tree, run_main, tmp_path):
    """A file in the published form: model and model_ema, and a Namespace of arguments beside them."""
    import argparse

    import timm

    import vim  # noqa: F401  registers the models

    model = timm.create_model("vim_nano_patch4_32", num_classes=3)
    path = tmp_path / "published.pth"
    torch.save({"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(model="x")}, path)
    done = run_main(*SMALL, "--data-path", tree, "--eval", "--resume", path)
    assert "12 test images" in done.stdout
