"""Run the Triton tests in Triton's interpreter, and compile every kernel for GPUs that are not there.

Both need a process of their own: the interpreter is switched on when Triton is imported, and compiling needs it off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("*/tests/**/test_*_triton.py"))

# Bytes of local memory per thread, where spilled registers go. With Triton 3.9 the norm's forward takes 8 on sm_80, and
# the convolution's backward, which holds 255 registers, up to 56 on sm_90; all others take none.
LOCAL_LIMIT = {"cuda:80": 8, "cuda:90": 56, "hip:gfx942": 0}


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1", **more}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the same tests run the compiled kernels")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(marks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *FILES]
    # The interpreter works on small arrays: more threads only get in each other's way.
    environ = environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


def compile_all(target: str, *arguments: str) -> None:
    program = Path(__file__).with_name("triton_aot.py")
    environ = environment()
    environ.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(program), target, *arguments], env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {"scan_forward", "scan_backward", "conv_backward", "norm_backward", "state_update"} <= {
        k["kernel"] for k in kernels
    }
    assert not [k for k in kernels if k["local"] > LOCAL_LIMIT[target]]


def test_compiles_for_hopper():
    compile_all("cuda:90", "Ti", "bfloat16", "quick")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", sorted(LOCAL_LIMIT))
def test_compiles_for_every_target(target, dtype):
    compile_all(target, "Ti,S,B", dtype)
