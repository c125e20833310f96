"""scripts/slurm/submit.py: what it asks for, what it refuses, and a real run of two processes on this machine."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SUBMIT = Path(__file__).parents[2] / "scripts" / "slurm" / "submit.py"


def submit(*argv, **variables):
    return subprocess.run(
        [sys.executable, SUBMIT, *map(str, argv)], text=True, capture_output=True, timeout=500,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


def test_dry_run(tmp_path):
    done = submit(
        "pt-small", "--data", tmp_path / "imagenet", "--output", tmp_path / "run", "--nodes", 2, "--gpus-per-node", 4,
        "--hours", 1.5, "--partition", "long", "--dry-run", "--seed", 3, "--lr", "1e-3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *wanted, flags = done.stdout.splitlines()
    values = dict(line.split("=", 1) for line in wanted)
    assert (values["nodes"], values["gpus_per_node"], values["tasks_per_node"]) == ("2", "4", "4")
    assert (values["timeout_min"], values["slurm_partition"], values["name"]) == ("90", "long", "run")
    assert "requeue" in values["slurm_additional_parameters"]
    assert "slurm_account" not in values
    flags = shlex.split(flags)
    assert flags[:3] == ["main.py", "--config", "recipes/pt-small.yaml"]
    assert flags[flags.index("--resume") + 1] == "auto"
    assert flags[flags.index("--data-path") + 1] == str(tmp_path / "imagenet")
    assert flags[-4:] == ["--seed", "3", "--lr", "1e-3"]


def test_mistakes_are_said_before_the_job_starts(tmp_path):
    for argv, words in (
        (("pt-huge", "--output", tmp_path), "invalid choice"),
        (("pt-tiny", "--output", tmp_path, "--epoch", 3), "unrecognized arguments"),
        (("pt-tiny", "--output", tmp_path / "run"), "SLURM"),
    ):
        done = submit(*argv, PATH="/usr/bin:/bin")
        assert done.returncode == 2, done.stdout
        assert words in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_on_this_machine(jpegs, tmp_path):
    """submitit starts both, they find each other, and train one model; the same command goes on from its checkpoint."""
    flags = (
        "ft-nano", "--output", tmp_path / "run", "--executor", "local", "--gpus-per-node", 0, "--tasks-per-node", 2,
        "--data", jpegs, "--data-set", "IMNET", "--in-chans", 3, "--batch-size", 1, "--device", "cpu",
    )  # fmt: skip
    for epochs in (1, 2):
        done = submit(*flags, "--epochs", epochs, GLOO_SOCKET_IFNAME="lo")
        assert done.returncode == 0, done.stderr
        assert "'test_images': 3" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1]
    import torch

    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert checkpoint["world_size"] == 2
