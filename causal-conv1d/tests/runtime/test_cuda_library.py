"""Finding and loading the CUDA library, and what happens to a call when a GPU backend cannot serve it."""

import ctypes
import logging
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from causal_conv1d_vim.conv import backends
from causal_conv1d_vim.runtime import backend
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.cuda_library import CudaLibrary


class Arguments(ctypes.Structure):
    """A launcher's argument block."""

    _fields_ = (("number", ctypes.c_int64),)


def library_in(path, **more) -> CudaLibrary:
    return CudaLibrary([str(path)], "libnone.so", launchers=["vim_f"], queries={"vim_q": [ctypes.c_int64]}, **more)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Libraries believe that any tensor is on a CUDA device of capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return SimpleNamespace(is_cuda=True, device=SimpleNamespace(type="cuda", index=0), dtype=torch.float32)


def test_missing_library_is_a_reason_and_an_error_when_used(tmp_path, on_a_gpu):
    assert "was not built" in library_in(tmp_path).why_not(on_a_gpu)
    with pytest.raises(RuntimeError, match="was not built"):
        library_in(tmp_path).query("vim_q", 1)


def test_broken_library_is_a_reason(tmp_path, on_a_gpu):
    (tmp_path / "_lib").mkdir()
    (tmp_path / "_lib" / "libnone.so").write_bytes(b"not a library")
    assert "does not load" in library_in(tmp_path).why_not(on_a_gpu)


@pytest.fixture
def built(tmp_path):
    """A library with the expected functions, for architectures 8.0 and 9.0."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "_lib").mkdir()
    source = tmp_path / "none.c"
    source.write_text(
        "#include <stdint.h>\nint vim_f(const void* a, void* s) { return 3; }\n"
        'int64_t vim_q(int64_t n) { return 2 * n; }\nconst char* vim_cuda_architectures() { return "80;90"; }\n'
    )
    output = str(tmp_path / "_lib" / "libnone.so")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", output], check=True)
    return library_in(tmp_path)


def test_functions_load_on_first_use(built):
    assert built.query("vim_q", 21) == 42


def test_failed_launch_names_the_function_and_the_error(built):
    with pytest.raises(RuntimeError, match="vim_f failed with CUDA error 3"):
        built.check("vim_f", built._run("vim_f", Arguments(), 0))
    with pytest.raises(RuntimeError, match="does not support"):
        built.check("vim_f", -1)


@pytest.mark.parametrize(
    ("capability", "served"), [((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 0), True), ((7, 5), False)]
)
def test_serves_its_architectures_and_later_ones(built, on_a_gpu, monkeypatch, capability, served):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = built.why_not(on_a_gpu)
    assert reason is None if served else "built for 8.0, 9.0" in reason


def test_other_dtypes_are_declined(built, on_a_gpu):
    on_a_gpu.dtype = torch.float64
    assert "float64 is none of float32" in built.why_not(on_a_gpu)


# As much of a tensor as the choice of a backend looks at.
ON_A_GPU = SimpleNamespace(is_cpu=False)


def decline(monkeypatch, name: str, reason: str | None) -> None:
    monkeypatch.setattr(backends.module(name), "why_not", lambda *args: reason)


def test_a_gpu_without_the_library_uses_triton_and_says_so_once(monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_said", set())
    decline(monkeypatch, "cuda", "the library was not built")
    decline(monkeypatch, "triton", None)
    with caplog.at_level(logging.INFO, logger="vision_mamba.backend"):
        assert [backends.pick(ON_A_GPU) for _ in range(2)] == ["triton", "triton"]
    assert [r.getMessage() for r in caplog.records] == [
        "causal_conv1d: backend cuda declines: the library was not built"
    ]


def test_a_gpu_with_a_broken_triton_too_ends_at_the_reference_with_a_warning(monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_said", set())
    for name in ("cuda", "triton", "cpu"):
        decline(monkeypatch, name, f"{name} is broken")
    with caplog.at_level(logging.WARNING, logger="vision_mamba.backend"):
        assert backends.pick(ON_A_GPU) == "reference"
    said = [r.getMessage() for r in caplog.records if r.name == "vision_mamba.backend"]
    assert sorted(line.split()[2] for line in said) == ["cpu", "cuda", "triton"]


def test_forcing_a_backend_that_cannot_run_is_an_error(monkeypatch):
    decline(monkeypatch, "cuda", "the library was not built")
    with backend.use_backend("cuda"), pytest.raises(backend.BackendError, match="the library was not built"):
        backends.pick(torch.zeros(1, 2, 3))


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch):
    pytest.importorskip("triton")

    def broken(*args):
        raise RuntimeError("no compiler\nand much more")

    kernels = pytest.importorskip("causal_conv1d_vim.runtime.triton_kernels")
    monkeypatch.setattr(kernels, "probe", {(1,): broken})
    reason = triton_runtime._probe(torch.device("cpu"))
    assert reason.startswith("a Triton kernel cannot be built or launched")
    assert "\n" not in reason
