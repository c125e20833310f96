"""What decides whether the CUDA kernels are compiled."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not on the PATH")


def configure(path: Path, **environment: str) -> subprocess.CompletedProcess:
    """cmake on `cmake/cuda.cmake` as a script, with only `path` on the PATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VIM_", "CUDA"))}
    env |= {"PATH": str(path), **environment}
    # The check for a compiler leaves files where it runs.
    command = [CMAKE, "-P", ROOT / "cmake" / "cuda.cmake"]
    return subprocess.run(command, cwd=path, env=env, text=True, capture_output=True, check=False)


def test_no_gpu_no_cuda_kernels(tmp_path):
    """Even where nvcc is: compiling for three architectures takes minutes and would serve nothing."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 0\n")
    nvcc.chmod(0o755)
    done = configure(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped, nvidia-smi lists no GPU; VIM_BUILD_CUDA=1 builds them anyway" in done.stdout


@pytest.mark.parametrize("value", ["0", "OFF"])
def test_asked_not_to(value, tmp_path):
    done = configure(tmp_path, VIM_BUILD_CUDA=value)
    assert done.returncode == 0, done.stderr
    assert f"skipped, VIM_BUILD_CUDA is {value}" in done.stdout


def test_asked_to_without_a_compiler(tmp_path):
    done = configure(tmp_path, VIM_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr


def test_named_architectures_and_gpus_look_for_nvcc(tmp_path):
    assert "skipped, nvcc was not found" in configure(tmp_path, VIM_CUDA_ARCHS="90").stdout
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\n")
    tool.chmod(0o755)
    assert "skipped, nvcc was not found" in configure(tmp_path).stdout
