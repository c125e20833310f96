"""Each mistake gets one sentence and status 2, without a traceback, and leaves nothing behind."""

import os
import pickle
import shutil
from pathlib import Path

import forked
import pytest
import timm
import torch

from vim.engine.run import main

REPOSITORY = Path(__file__).parents[2]
MODEL = ("--model", "vim_nano_patch4_32", "--input-size", "32", "--batch-size", "8", "--num_workers", "0")


class Code:
    """Runs something when unpickled."""

    def __reduce__(self):
        return (print, ("this code must not run",))


@pytest.fixture
def refused(tmp_path, capsys):
    """Run main.py with these flags; it must refuse with one sentence that holds `words` and write nothing."""

    def check(*argv, words: str, output: bool = True) -> None:
        folder = tmp_path / "output"
        status = main([*map(str, argv), *(("--output_dir", str(folder)) if output else ())])
        captured = capsys.readouterr()
        assert status == 2
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, captured.err
        assert words in errors[0]
        assert "Traceback" not in captured.err
        assert "this code must not run" not in captured.out
        assert not folder.exists()

    return check


def test_flags(refused, tree):
    data = ("--data-path", tree)
    refused(*MODEL, *data, "--modle", "x", words="unrecognized arguments: --modle")
    refused(*MODEL, *data, "--epoch", "3", words="unrecognized arguments: --epoch")
    refused(*MODEL, *data, "--batch-size", "0", words="--batch-size is 0")
    refused(*MODEL, *data, "--resplit", words="no splits")
    refused(*MODEL, *data, "--src", words="--ThreeAugment")
    refused(*MODEL, *data, "--batch-size", "7", words="must be even")
    refused("--eval", *MODEL, *data, words="--resume")


def test_environment(refused, tree, monkeypatch, tmp_path):
    """Before anything is written, by every command line; in forks, as the library reads its variable when it loads."""
    monkeypatch.setenv("VIM_BACKEND", "gpu")
    refused(*MODEL, "--data-path", tree, words="VIM_BACKEND is 'gpu', but the backends are cuda, triton, cpu")
    monkeypatch.delenv("VIM_BACKEND")
    checkpoint = _checkpoint(tmp_path, 3)
    out = tmp_path / "o"
    commands = (
        ("main.py", *MODEL, "--data-path", tree, "--device", "cpu", "--output_dir", out),
        ("-c", "import sys; from vim.analysis.predict import main; sys.exit(main())", tree / "val" / "red" / "0.jpg",
         "--checkpoint", checkpoint, "--model", "vim_nano_patch4_32", "--out", out),
        (REPOSITORY / "scripts" / "export_onnx.py", "vim_nano_patch4_32", "--output", out),
    )  # fmt: skip
    for command in commands:
        for name, value, words in (
            ("VIM_CPU_ISA", "sse9", "VIM_CPU_ISA is 'sse9', but it is none of baseline, avx2"),
            ("VIM_BACKEND", "gpu", "VIM_BACKEND is 'gpu', but the backends are"),
        ):
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", name: value}
            done = forked.run(*command, cwd=REPOSITORY / "vim", env=env, timeout=120)
            assert done.returncode == 2, done.stderr
            assert done.stderr.splitlines()[-1].startswith(f"error: {words}"), done.stderr
            assert "Traceback" not in done.stderr
            assert not out.exists()


def test_model(refused, tree, tmp_path):
    refused("--model", "vim_tinny_patch16_224", "--data-path", tree, words="did you mean vim_tiny_patch16_224")
    tagged = ("--model", "vim_tiny_patch16_224.nonsense", "--data-path", tree)
    refused(*tagged, words="vim_tiny_patch16_224 has vim_tiny_patch16_224.midclstok_in1k; leave out .nonsense")
    refused(*tagged, "--eval", "--resume", _checkpoint(tmp_path, 3), words="leave out .nonsense")
    refused(*MODEL, "--data-path", tree, "--input-size", "3", words="patch size")


def test_data(refused, tree, tmp_path):
    refused(*MODEL, words="needs --data-path")
    refused(*MODEL, "--data-set", "IMAGENET", "--data-path", tree, words="--data-set is 'IMAGENET'")
    refused(*MODEL, "--data-path", tmp_path / "absent", words="is not a folder")
    (tmp_path / "empty").mkdir()
    refused(*MODEL, "--data-path", tmp_path / "empty", words="is not a folder")
    holed = tmp_path / "holed"
    shutil.copytree(tree, holed)
    (holed / "val" / "purple").mkdir()
    refused(*MODEL, "--data-path", holed, words="purple has no images")
    (holed / "val" / "purple").rmdir()
    (holed / "val" / "red" / "0.jpg").write_bytes(b"not a picture")
    refused(*MODEL, "--data-path", holed, "--eval", "--finetune", _checkpoint(tmp_path, 3), words="red/0.jpg")
    refused(
        *MODEL, "--num_workers", "2", "--data-path", holed, "--eval", "--finetune", _checkpoint(tmp_path, 3),
        words="red/0.jpg",
    )  # fmt: skip
    refused(*MODEL, "--data-path", tree, "--batch-size", "64", words="fewer than one batch")


def _checkpoint(folder, classes, **kwargs):
    path = folder / "weights.pth"
    torch.save({"model": timm.create_model("vim_nano_patch4_32", num_classes=classes, **kwargs).state_dict()}, path)
    return path


def test_checkpoints(refused, tree, tmp_path):
    run = (*MODEL, "--data-path", tree, "--eval", "--resume")
    refused(*run, tmp_path / "absent.pth", words="there is no checkpoint at")
    good = _checkpoint(tmp_path, 3)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    refused(*run, truncated, words="truncated")
    (tmp_path / "text.pth").write_text("hello")
    refused(*run, tmp_path / "text.pth", words="not a checkpoint")
    torch.save({"model": Code()}, tmp_path / "code.pth")
    refused(*run, tmp_path / "code.pth", words="could run code")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"model": Code()}))
    refused(*run, tmp_path / "pickle.pth", words="could run code")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(*run, tmp_path / "list.pth", words="expected a dictionary")
    refused(*run, _checkpoint(tmp_path, 5), words="head.weight (5, 64) instead of (3, 64)")
    refused(*run, _checkpoint(tmp_path, 3, depth=4), words="missing: layers.4.")


def test_output_that_cannot_be_written(refused, tree, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        *MODEL, "--data-path", tree, "--output_dir", tmp_path / "file" / "run", words="cannot be written", output=False
    )


def test_config(refused, tree, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("learning-rate: 3\n")
    refused("--config", config, words="unknown flags: learning_rate")
    config.write_text("[1, 2]")
    refused("--config", config, words="one mapping")
    refused("--config", tmp_path / "absent.yaml", words="cannot be read")
