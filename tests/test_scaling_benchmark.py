"""benchmarks/scaling.py end to end, small, over gloo."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


def launch(*argv):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, argv)], text=True, capture_output=True, timeout=550,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip


@pytest.mark.slow
def test_replicas_shards_and_jpegs(tmp_path):
    done = launch(
        "--model", "vim_nano_patch4_32", "--input-size", 32, "--processes", 1, 2, "--modes", "ddp", "fsdp",
        "--batch-size", 4, "--steps", 2, "--jpegs", 16, "--out", tmp_path, "--device", "cpu", "--num_workers", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = [(row["input"], row["mode"], int(row["processes"])) for row in rows]
    assert cases == [(i, m, p) for i in ("synthetic", "jpeg") for m, p in (("ddp", 1), ("ddp", 2), ("fsdp", 2))]
    for row in rows:
        assert float(row["images_per_s"]) > 0
        assert float(row["memory_mib"]) > 50
        single = next(r for r in rows if (r["input"], r["processes"]) == (row["input"], "1"))
        expected = float(row["images_per_s"]) / int(row["processes"]) / float(single["images_per_s"])
        assert float(row["efficiency"]) == pytest.approx(expected)
        # A batch that lies on the device is not waited for.
        assert (float(row["wait_share"]) > 0.01) is (row["input"] == "jpeg")
    assert len(list(tmp_path.glob("jpegs-16/train/*/*.jpg"))) == 16


def test_a_case_that_fails_is_said(tmp_path):
    done = launch("--model", "vim_absent", "--processes", 1, "--batch-size", 4, "--out", tmp_path, "--device", "cpu")
    assert done.returncode == 1
    assert "there is no model 'vim_absent'" in done.stderr
