"""CUDA kernels compiled for the CPU against `cuda_emulation.h`, so that their arithmetic is tested without a GPU."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from causal_conv1d_vim.runtime.cuda_library import CudaLibrary

ROOT = Path(__file__).resolve().parents[3]
INCLUDES = (ROOT / "causal-conv1d/csrc", Path(__file__).parent)
CONV_SOURCES = [ROOT / "causal-conv1d/csrc/cuda" / name for name in ("causal_conv1d.cu", "conv_pair.cu")]
ARCHITECTURES = ROOT / "causal-conv1d/csrc/common/architectures.cu"  # in both libraries
MAMBA_SOURCES = [
    ROOT / "mamba-1p1p1/csrc/cuda" / f"{name}.cu"
    for name in ("scan_forward", "scan_stream", "scan_backward", "scan_backward_finish", "mixer_weights")
]


def emulate(library: CudaLibrary, sources: Sequence[Path], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Compile `sources` into `folder` and let `library` run them on CPU tensors until `patch` is undone.

    The test is skipped where there is no C++ compiler.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = folder / f"{sources[0].stem}.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", '-DVIM_CUDA_ARCHITECTURES="90"', "-x", "c++"]
    includes = [f"-I{include}" for include in INCLUDES]
    subprocess.run([*command, *includes, *map(str, [*sources, ARCHITECTURES]), "-o", str(path)], check=True)
    for name in ("_library", "_reason", "_architectures", "_checked"):
        patch.setattr(library, name, getattr(library, name))
    library.bind(ctypes.CDLL(str(path)))
    patch.setattr(library, "launch", lambda name, args, x: library.check(name, library._run(name, args, 0)))


def spills(source: Path, architecture: str, folder: Path) -> list[int]:
    """Bytes per thread that each kernel of `source` keeps in local memory, compiled by nvcc; skips without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH: the CUDA sources were not compiled for any GPU")
    command = [nvcc, f"-arch=sm_{architecture}", "-std=c++17", "-O3", "--resource-usage", "-diag-suppress=128", "-c"]
    command += [f"-I{INCLUDES[0]}", str(source), "-o", str(folder / "kernels.o")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return [int(count) for count in re.findall(r"(\d+) bytes spill stores", report)]
