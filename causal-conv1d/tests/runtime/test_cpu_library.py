"""Loading of the native library, the forced instruction sets, and indexing beyond 2^31 elements."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from causal_conv1d_vim.conv import cpu
from causal_conv1d_vim.runtime import cpu_library
from causal_conv1d_vim.runtime.backend import BackendError
from headers import check_arguments

needs_library = pytest.mark.skipif(cpu.library.reason is not None, reason=str(cpu.library.reason))
BEST = cpu.library.instruction_set or "baseline"
ROOT = Path(__file__).parents[3]


def test_missing_library_says_how_to_build_it(tmp_path):
    library = cpu_library.Library("vim_conv", [str(tmp_path)])
    assert "scripts/build_native.sh" in library.reason
    with pytest.raises(RuntimeError, match="was not built"):
        library.function("vim_conv_forward", cpu.ARGUMENTS)(b"")


def test_broken_library_is_a_reason_and_not_a_crash(tmp_path):
    (tmp_path / "_lib").mkdir()
    (tmp_path / "_lib" / "libvim_conv.so").write_bytes(b"not a library")
    (tmp_path / "_lib" / "libvim_conv.dylib").write_bytes(b"not a library")
    assert "does not load" in cpu_library.Library("vim_conv", [str(tmp_path)]).reason


@pytest.mark.parametrize(("system", "file"), [
    ("win32", "libvim_conv.dll"), ("win32", "vim_conv.dll"), ("darwin", "libvim_conv.dylib"),
    ("linux", "libvim_conv.so"),
])  # fmt: skip
def test_file_name_of_each_system(system, file, tmp_path, monkeypatch):
    (tmp_path / "_lib").mkdir()
    (tmp_path / "_lib" / file).write_bytes(b"not a library")
    monkeypatch.setattr(sys, "platform", system)
    assert "does not load" in cpu_library.Library("vim_conv", [str(tmp_path)]).reason


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="asks Linux on x86_64")
@needs_library
def test_best_instruction_set_is_chosen():
    """Against what Linux says of the processor: a wrong answer costs a factor of two to four and no test's result."""
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    avx2 = flags >= {"avx2", "fma", "f16c"}
    avx512 = avx2 and flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
    expected = "avx512" if avx512 else "avx2" if avx2 else "baseline"
    code = "from causal_conv1d_vim.conv.cpu import library; print(library.instruction_set)"
    assert run_with("", code).stdout.split() == [expected]


@needs_library
def test_library_of_other_sources_says_to_install_again():
    with pytest.raises(BackendError, match=r"lacks vim_no_such_kernel.*install again"):
        cpu.library.function("vim_no_such_kernel", cpu.ARGUMENTS)
    with pytest.raises(BackendError, match=r"takes 208 bytes of arguments in vim_conv_forward instead of 8: .*install"):
        cpu.library.function("vim_conv_forward", cpu_library.Arguments("batch"))


@pytest.mark.parametrize(("struct", "arguments"), [("Conv", cpu.ARGUMENTS), ("ConvProject", cpu.PROJECT_ARGUMENTS)])
def test_arguments_have_the_names_of_the_header(struct, arguments):
    check_arguments(arguments, "causal-conv1d/csrc/cpu/conv.h", f"{struct}Args")


def run_with(isa: str, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VIM_CPU_ISA": isa}, capture_output=True, text=True
    )


@needs_library
@pytest.mark.parametrize("isa", cpu_library.INSTRUCTION_SETS[: cpu_library.INSTRUCTION_SETS.index(BEST) + 1])
def test_lower_instruction_set_can_be_forced(isa):
    code = (
        "import torch; from causal_conv1d_vim.conv import cpu, reference as r; torch.manual_seed(0);"
        "x, w = torch.randn(2, 40, 37), torch.randn(37, 4); k = dict(silu=True, reverse=True);"
        "ours, exact = cpu.forward(x, w, None, None, **k), r.forward(x, w, None, None, **k);"
        "assert (ours - exact).abs().max() < 1e-5; print(cpu.library.instruction_set)"
    )
    done = run_with(isa, code)
    assert done.stdout.strip() == isa, done.stderr


@needs_library
def test_unknown_or_absent_instruction_set_is_named():
    code = "from causal_conv1d_vim.conv import cpu"
    assert "VIM_CPU_ISA is 'sse9'" in run_with("sse9", code).stderr
    if cpu.library.instruction_set != "avx512" and not os.environ.get("VIM_CPU_ISA"):  # the best set here is not it
        assert "this machine does not have it" in run_with("avx512", code).stderr


@needs_library
def test_strides_beyond_2_31_elements():
    """Two batch items 2^31 + 64 elements apart in one lazily backed allocation, of which few pages are touched."""
    apart = 2**31 + 64
    memory = torch.empty(apart + 4 * 32, dtype=torch.bfloat16)
    x = memory.as_strided((2, 4, 32), (apart, 32, 1))
    x.copy_(torch.randn(2, 4, 32))
    weight = torch.randn(32, 3)
    far = cpu.forward(x, weight, None, None, silu=True, reverse=False)
    near = cpu.forward(x.contiguous(), weight, None, None, silu=True, reverse=False)
    assert torch.equal(far, near)


_CLANG = next(filter(None, map(shutil.which, ("clang++", *(f"clang++-{v}" for v in range(22, 13, -1))))), None)


@pytest.mark.slow
@pytest.mark.skipif(_CLANG is None or shutil.which("cmake") is None, reason="needs clang++ and cmake")
def test_clang_compiles_the_libraries_without_a_warning(tmp_path):
    options = [f"-DCMAKE_CXX_COMPILER={_CLANG}", "-DCMAKE_CXX_FLAGS=-Werror", "-DVIM_BUILD_CUDA=0"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", tmp_path, "--parallel", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("vim_conv", "vim_mamba"):
        library = ctypes.CDLL(str(next(tmp_path.glob(f"lib{name}.*"))))
        assert library.vim_isa() == cpu_library.INSTRUCTION_SETS.index(BEST)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_operators_under_address_and_undefined_behaviour_sanitizers():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test_sanitizers.sh")],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
