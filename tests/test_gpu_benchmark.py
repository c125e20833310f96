"""benchmarks/gpu.py runs from end to end in its tiny mode, so that no time on a GPU is lost to typos."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def run(tmp_path, *arguments, **environ):
    path = os.pathsep.join(p for p in sys.path if p)
    environ = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environ}
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def rows(tmp_path):
    with open(tmp_path / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_measures_kernels(tmp_path):
    result = run(tmp_path, "--tiny", "--only", "kernels", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no failures" in result.stdout
    measured = {row["what"] for row in rows(tmp_path) if row["section"] == "kernels"}
    assert {"scan forward", "scan backward", "conv backward", "norm backward"} <= measured


@pytest.mark.slow
def test_measures_models(tmp_path):
    result = run(tmp_path, "--tiny", "--only", "mixer,models", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert {row["section"] for row in rows(tmp_path)} == {"mixer", "models"}
    measured = {(row["what"], row["note"]) for row in rows(tmp_path) if row["section"] == "models"}
    for peer in ("vim-nano", "deit-nano"):
        assert {
            (f"{peer} {what}", mode) for what in ("inference", "training step") for mode in ("eager", "graph")
        } <= measured
    assert ("deit, plain attention-nano inference", "graph") in measured


def test_refuses_a_machine_without_a_gpu(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2
    assert "there is no GPU" in result.stderr
