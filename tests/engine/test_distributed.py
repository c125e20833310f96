"""Two processes against one: the same training, exact evaluation, sharding, checkpoints for any number of them.

On CPUs through gloo, and where two GPUs are there through NCCL: pytest -m gpu tests/engine/test_distributed.py
"""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
# Mixing, dropout and stochastic depth draw one random number per process and batch: off, as only then one process can
# do what two do. Augmentation is on: it is drawn per sample, wherever that is loaded.
FLAGS = (
    "--model", "vim_nano_patch4_32", "--input-size", "32", "--epochs", "2", "--lr", "2.0", "--warmup-epochs", "0",
    "--opt", "sgd", "--clip-grad", "1.0", "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--seed", "5",
    "--model-ema-decay", "0.5", "--num_workers", "0", "--checkpoint-interval", "1",
)  # fmt: skip


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """What the processes run on, one GPU each."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return request.param


def environment(device):
    hidden = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"} if device == "cpu" else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", **hidden}


class Ranks:
    """The processes of one run, with the environment that torchrun gives them."""

    def __init__(self, device, processes, *argv):
        shared = {}
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        self.ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            env = {**environment(device), **shared, **own}
            self.ranks.append(forked.Forked("main.py", "--device", device, *argv, cwd=REPOSITORY / "vim", env=env))

    def communicate(self, timeout):
        texts = [rank.communicate(timeout) for rank in self.ranks]
        self.returncode = max(abs(rank.returncode) for rank in self.ranks)
        return ["".join(part) for part in zip(*texts, strict=True)]


def torchrun(device, processes, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, "main.py", "--device", device, *map(str, argv)], cwd=REPOSITORY / "vim", env=environment(device),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def launch(device, processes, *argv, start=Ranks):
    process = start(device, processes, *argv)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out, err


def state(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True, map_location="cpu")


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def odd_tree(tree, tmp_path_factory):
    """The synthetic tree with one evaluation image more: 13, no multiple of two processes."""
    root = tmp_path_factory.mktemp("odd") / "tree"
    shutil.copytree(tree, root)
    shutil.copy(root / "val" / "red" / "0.jpg", root / "val" / "red" / "more.jpg")
    return root


@pytest.fixture(scope="module")
def runs(device, odd_tree, tmp_path_factory):
    """Folder of the run with these flags by so many processes, and what it printed to standard error."""
    done = {}

    def run(processes, *argv):
        key = (processes, *argv)
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            batch = 8 // processes
            _, err = launch(
                device, processes, *FLAGS, "--batch-size", batch, "--data-path", odd_tree, "--output_dir", folder, *argv
            )
            done[key] = folder, err
        return done[key]

    return run


def assert_equal_training(one, two):
    """Loss curve, evaluation and final weights within float32's rounding.

    Six updates of norm at most lr × clip = 2 × 8 / 512 each; gradients are sums of a few hundred float32 terms in
    another order, so they differ by some 1e-6 of their size, and updates of up to 0.03 by 1e-6 in all, with room.
    """
    for first, second in zip(records(one), records(two), strict=True):
        for name in ("train_loss", "test_loss", "ema_test_loss", "train_grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
        for name in ("test_acc1", "test_acc5", "ema_test_acc1", "train_lr"):
            assert second[name] == pytest.approx(first[name], rel=1e-12), name
    first, second = state(one), state(two)
    for key in ("model", "model_ema"):
        assert first[key].keys() == second[key].keys()
        for name, value in first[key].items():
            torch.testing.assert_close(second[key][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("sampling", ["--no-repeated-aug", "--repeated-aug"])
def test_two_processes_train_like_one(runs, sampling):
    one, two = runs(1, sampling), runs(2, sampling)
    assert_equal_training(one[0], two[0])
    before = state(one[0])["model"]["head.weight"]
    assert not torch.allclose(before, torch.zeros_like(before), atol=1e-3)


def test_accumulation_over_two_processes(runs):
    """Gradients are exchanged with the last batch of an update only, and the update is the same."""
    whole = runs(1, "--no-repeated-aug")[0]
    assert_equal_training(whole, runs(2, "--no-repeated-aug", "--batch-size", "2", "--grad-accum-steps", "2")[0])


def test_only_the_first_process_speaks(runs):
    _, err = runs(2, "--no-repeated-aug")
    for words in ("epoch 1/2  loss", "epoch 2/2  loss", "epoch 1/2  3/3"):
        assert err.count(words) == 1, err


def test_evaluation_counts_every_image_once(device, runs, odd_tree, tmp_path):
    """13 images over two processes: counts and figures of one process, nothing padded, per class too."""
    checkpoint = runs(1, "--no-repeated-aug")[0] / "checkpoint.pth"
    printed, tables = [], []
    for processes in (1, 2):
        table = tmp_path / f"{processes}.csv"
        out, _ = launch(device, processes, "--eval", "--resume", checkpoint, "--data-path", odd_tree,
                        "--num_workers", "0", "--per-class-csv", table)  # fmt: skip
        lines = out.splitlines()
        assert sum("13 test images" in line for line in lines) == 2  # of the weights and of their average
        printed.append(json.loads(lines[-1]))
        with table.open() as file:
            tables.append(list(csv.reader(file)))
    for name in ("test_acc1", "test_acc5", "ema_test_acc1"):
        assert printed[0][name] == printed[1][name]
    assert printed[0]["test_loss"] == pytest.approx(printed[1]["test_loss"], rel=1e-5)
    assert tables[0] == tables[1]
    assert [row[1] for row in tables[0]] == ["images", "4", "4", "5"]


def test_shards_train_like_replicas(device, runs, tmp_path):
    """FSDP2 trains what one process trains; its checkpoint is whole: one process evaluates it and goes on from it."""
    one, sharded = runs(1, "--no-repeated-aug")[0], runs(2, "--no-repeated-aug", "--fsdp")[0]
    assert_equal_training(one, sharded)
    out, _ = launch(device, 1, "--eval", "--resume", sharded / "checkpoint.pth")
    assert json.loads(out.splitlines()[-1])["test_acc1"] == records(sharded)[-1]["test_acc1"]
    for processes, folder, flags in ((1, one, ()), (1, sharded, ("--batch-size", "8")), (2, one, ("--fsdp",))):
        target = tmp_path / f"{processes}{folder.name}"
        flags = (*flags, "--batch-size", 8 // processes, "--epochs", "3", "--output_dir", target)
        launch(device, processes, "--resume", folder / "checkpoint.pth", *flags)
    first, *others = sorted(tmp_path.iterdir())
    for other in others:
        for name, value in state(first)["model"].items():
            torch.testing.assert_close(state(other)["model"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "mode",
    [
        ("--clip-mode", "value", "--clip-grad", "0.05"),
        ("--grad-accum-steps", "2"),
        # With an epsilon above most gradients, so that those near zero do not turn rounding into whole steps.
        ("--opt", "adamw", "--opt-eps", "0.1"),
    ],
)
def test_shards_with_other_options(runs, mode):
    flags = ("--no-repeated-aug", *mode)
    assert_equal_training(runs(1, *flags)[0], runs(2, "--fsdp", *flags)[0])


def test_one_process_killed(device, runs, odd_tree, tmp_path):
    """Under torchrun, SIGKILL of one rank ends the run; --resume auto gives the bits of an undisturbed run of two."""
    expected = runs(2, "--no-repeated-aug")[0]
    argv = (*FLAGS, "--no-repeated-aug", "--batch-size", 4, "--data-path", odd_tree, "--output_dir", tmp_path)
    process = torchrun(device, 2, *argv, "--resume", "auto")
    deadline = time.monotonic() + 300
    while not (tmp_path / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0, err
    _, err = launch(device, 2, *argv, "--resume", "auto", start=torchrun)
    assert err.count("resuming from") == 1
    first, second = state(expected), state(tmp_path)
    assert all(torch.equal(first["model"][k], second["model"][k]) for k in first["model"])
