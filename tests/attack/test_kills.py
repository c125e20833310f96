"""Runs killed at random again and again: what they leave loads, and the run that ends has an undisturbed one's bits."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vim.analysis.plots import read_log

CHAINS, KILLS = 8, 5
# All that draws random numbers is on; a checkpoint after every step; an average of the weights.
FLAGS = (
    "--model", "vim_nano_patch4_32", "--model-kwargs", "depth=1", "embed_dim=16", "--input-size", "16", "--batch-size",
    "8", "--epochs", "2", "--lr", "0.01", "--unscale-lr",
    "--warmup-epochs", "0", "--drop", "0.1", "--drop-path", "0.2", "--seed", "7",
    "--model-ema-decay", "0.9", "--checkpoint-interval", "1", "--keep-every-epochs", "1", "--device", "cpu",
    "--resume", "auto",
)  # fmt: skip


@pytest.fixture(scope="module")
def forks():
    """Send orders to `forks.py`; gives its answers."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("forks.py")], env=env, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip

        def order(argv, log, kill=None):
            process.stdin.write(json.dumps({"argv": [str(a) for a in argv], "log": str(log), "kill": kill}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield order
        process.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(forks, tree, tmp_path_factory):
    """Folder of a run that nothing disturbs, and what `forks.py` says of it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    answer = forks([*FLAGS, "--num_workers", 0, "--data-path", tree, "--output_dir", folder], folder.parent / "log")
    assert answer["status"] == 0, (folder.parent / "log").read_text()
    assert answer["points"] > 30
    return folder, answer


def assert_same(first, second, at=""):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), at
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), at
        for key in first:
            assert_same(first[key], second[key], f"{at}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), at
        for k, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{at}[{k}]")
    else:
        assert first == second, at


def content(folder, name="checkpoint.pth"):
    loaded = torch.load(folder / name, weights_only=True)
    return {k: v for k, v in loaded.items() if k != "args"}


def figures(folder):
    """The log's figures of each epoch that do not measure time or memory."""
    return [
        {k: v for k, v in record.items() if not k.endswith(("_s", "_mib"))} for record in read_log(folder / "log.txt")
    ]


@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_runs_end_with_the_same_bits(forks, undisturbed, tree, tmp_path, chain):
    expected, answer = undisturbed
    draw = random.Random(chain)
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = [*FLAGS, "--num_workers", chain % 2, "--data-path", tree, "--output_dir", folder]
    killed = 0
    while killed < KILLS:
        if draw.random() < 0.6:
            # Early ones too, so that a chain gets to its end by more than one kill.
            kill = {"point": draw.randint(1, answer["points"] // 2)}
        else:
            kill = {"after": draw.uniform(0.05, answer["seconds"])}
        status = forks(argv, log, kill)["status"]
        text = log.read_text()
        assert "Traceback" not in text
        assert "error:" not in text
        if status == 0:
            # It was faster: begin the folder again.
            assert_same(content(expected), content(folder))
            for path in folder.rglob("*.pth"):
                path.unlink()
            (folder / "log.txt").unlink()
            continue
        assert status == -signal.SIGKILL
        killed += 1
        for path in folder.glob("*.pth"):
            torch.load(path, weights_only=True)
    assert forks(argv, log)["status"] == 0, log.read_text()
    names = {path.name for path in expected.glob("*.pth")}
    assert names == {path.name for path in folder.glob("*.pth")} > {"best_checkpoint.pth", "checkpoint_0001.pth"}
    for name in names - {"previous_checkpoint.pth"}:
        assert_same(content(expected, name), content(folder, name), name)
    assert figures(folder) == figures(expected)
    assert not list(folder.glob(".*"))
