"""Runs that are killed, stopped by signals or find a damaged checkpoint end with the bits of an undisturbed run."""

import os
import signal
import time
from pathlib import Path

import forked
import pytest
import torch

from vim.analysis.plots import read_log
from vim.engine import checkpoints
from vim.errors import UserError

REPOSITORY = Path(__file__).parents[2]
# All that draws random numbers is on: augmentation, mixing, stochastic depth, dropout; and an average of the weights.
FLAGS = (
    "--model", "vim_nano_patch4_32", "--input-size", "32", "--batch-size", "8", "--epochs", "3", "--lr", "0.05",
    "--warmup-epochs", "1", "--drop", "0.1", "--drop-path", "0.2", "--model-ema-decay", "0.9", "--seed", "7",
    "--checkpoint-interval", "1", "--device", "cpu",
)  # fmt: skip

# Runs main.py, and kills the process by SIGKILL at the N-th call of a function.
KILLER = """
import os, signal, sys
import torch
from vim.engine import checkpoints, run, training

where, count = sys.argv[1], int(sys.argv[2])
module, name = {"update": (training, "_update"), "evaluate": (run, "evaluate"), "rename": (os, "replace"),
                "write": (torch, "save"), "worker": (training, "_accumulate")}[where]
whole, calls = getattr(module, name), 0

def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        if where == "write":  # half a file
            whole(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **kwargs)

setattr(module, name, dying)
sys.exit(run.main(sys.argv[3:]))
"""


def environment():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def start(*command):
    return forked.Forked(*command, cwd=REPOSITORY / "vim", env=environment())


def finish(process):
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def state(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def assert_same(expected, actual, at=""):
    """Two checkpoints agree in every bit of weights, average, optimizer, and in every counter."""
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "epoch", "step", "best", "loss_sum", "skipped"):
        _assert_same(expected[key], actual[key], f"{at}{key}")


def _assert_same(first, second, at):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), at
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), at
        for key in first:
            _assert_same(first[key], second[key], f"{at}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), at
        for k, (a, b) in enumerate(zip(first, second, strict=True)):
            _assert_same(a, b, f"{at}[{k}]")
    else:
        assert first == second, at


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory):
    """Folder of a run of three epochs of three steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, err = finish(start("main.py", *FLAGS, "--num_workers", 0, "--data-path", tree, "--output_dir", folder))
    assert code == 0, err
    return folder


def figures(folder):
    """The log's figures of each epoch that do not measure time."""
    timed = ("_s", "_mib")
    return [{k: v for k, v in record.items() if not k.endswith(timed)} for record in read_log(folder / "log.txt")]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_end_with_the_same_bits(tree, undisturbed, tmp_path, workers):
    """SIGKILL in an update, half-way through writing a checkpoint, before its rename, in an evaluation, and again."""
    points = (("update", 2), ("write", 2), ("rename", 3), ("evaluate", 1), ("update", 3), ("worker", 2))
    argv = (*FLAGS, "--num_workers", workers, "--data-path", tree, "--output_dir", tmp_path, "--resume", "auto")
    for where, count in points:
        code, _, err = finish(start("-c", KILLER, where, count, *argv))
        assert code == -signal.SIGKILL, f"{where} {count}: {err}"
    code, _, err = finish(start("main.py", *argv))
    assert code == 0, err
    assert "resuming from" in err
    assert_same(state(undisturbed), state(tmp_path))
    assert figures(tmp_path) == figures(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_stop(tree, undisturbed, tmp_path, signum):
    """The run saves after the step at hand, says how to go on, ends with status 0, and goes on to the same bits."""
    argv = (*FLAGS, "--num_workers", 2, "--data-path", tree, "--output_dir", tmp_path, "--resume", "auto")
    process = start("main.py", *argv, "--print-every-steps", 1)
    deadline = time.monotonic() + 300
    while not (tmp_path / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signum)
    code, _, err = finish(process)
    assert code == 0, err
    assert "stopped by a signal" in err
    assert "--resume auto" in err
    assert "Traceback" not in err
    stopped = state(tmp_path)
    assert (stopped["epoch"], stopped["step"]) < (3, 0)
    code, _, err = finish(start("main.py", *argv))
    assert code == 0, err
    assert_same(state(undisturbed), state(tmp_path))


@pytest.mark.slow
def test_damaged_checkpoint_is_passed_over(tree, undisturbed, tmp_path):
    """The newest file is cut short: a warning names it, the one before it serves, the run ends with the same bits."""
    argv = (*FLAGS, "--num_workers", 0, "--data-path", tree, "--output_dir", tmp_path, "--resume", "auto")
    code, _, err = finish(start("-c", KILLER, "update", 6, *argv))
    assert code == -signal.SIGKILL, err
    newest = tmp_path / "checkpoint.pth"
    os.truncate(newest, newest.stat().st_size // 2)
    code, _, err = finish(start("main.py", *argv))
    assert code == 0, err
    assert "checkpoint.pth is truncated" in err
    assert "trying the one before it" in err
    assert "previous_checkpoint.pth" in err
    assert_same(state(undisturbed), state(tmp_path))


def test_auto_takes_the_newest_good_checkpoint(tmp_path, caplog):
    """Every kind of damage is passed over; with none left the run does not silently start afresh."""
    assert checkpoints.read("auto", str(tmp_path)) is None
    counts = dict.fromkeys(("epoch", "step", "skipped", "updates"), 0)
    numbers = dict.fromkeys(("best", "loss_sum", "norm_sum"), 0.0)
    parts = {"model": {"a": torch.zeros(1)}, "optimizer": {}, "lr_scheduler": {}, "model_ema": None, "scaler": None}
    good = {**parts, **counts, **numbers, "args": {}, "world_size": 1}
    for k, name in enumerate(("checkpoint_0001.pth", "best_checkpoint.pth", "previous_checkpoint.pth")):
        checkpoints.save_atomically({**good, "epoch": k + 1}, tmp_path / name)
        os.utime(tmp_path / name, (k, k))
    assert checkpoints.read("auto", str(tmp_path))["epoch"] == 3
    caplog.set_level("INFO", "vision_mamba")
    (tmp_path / "checkpoint.pth").write_bytes(b"not a checkpoint")
    torch.save({"model": {}}, tmp_path / "previous_checkpoint.pth")
    caplog.clear()
    assert checkpoints.read("auto", str(tmp_path))["epoch"] == 2
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING", "INFO"]
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.read("auto", str(tmp_path))
    with pytest.raises(UserError, match="pass that too"):
        checkpoints.read("auto", "")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk half-way through: the old checkpoint is whole, and nothing else lies about."""
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_atomically({"epoch": 1}, path)
    write = torch.save

    def full(content, target):
        write(content, target)
        os.truncate(target, 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_atomically({"epoch": 2}, path)
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]
