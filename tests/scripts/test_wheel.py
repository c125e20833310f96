"""The wheel in an empty environment without a compiler: the native kernels serve and pass the operators' tests."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# The operators on a CPU: against their references, at their edges, and what a compiled graph makes of them.
TESTS = [
    "causal-conv1d/tests/conv/test_conv.py",
    "causal-conv1d/tests/conv/test_conv_cpu.py",
    "mamba-1p1p1/tests/ops/selective_scan/test_selective_scan_cpu.py",
    "mamba-1p1p1/tests/ops/norm",
    "mamba-1p1p1/tests/ops/test_selective_scan_interface.py",
    "mamba-1p1p1/tests/test_mamba_module.py",
]


@pytest.fixture(scope="module")
def builder():
    """`scripts/build_wheels.py` as a module."""
    spec = importlib.util.spec_from_file_location("build_wheels_script", ROOT / "scripts" / "build_wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("arguments", "words"), [
    (["linux-riscv64"], "no platform linux-riscv64"), (["macos-arm64", "--cuda"], "--cuda goes with linux-x86_64"),
    (["--cuda"], "--cuda goes with"),
])  # fmt: skip
def test_builder_refuses(arguments, words, builder, capsys):
    with pytest.raises(SystemExit) as exit_:
        builder.main(arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("platform", "missing"), [
    ("linux-x86_64", "nvcc"), ("linux-x86_64", "g++"), ("linux-aarch64", "aarch64-linux-gnu-g++"),
])  # fmt: skip
def test_builder_without_a_compiler(platform, missing, builder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(builder.shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    assert builder.main([platform, "--cuda", "--output", str(tmp_path / "dist")]) == 1
    assert f"--cuda needs {missing}" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()


def test_cuda_for_aarch64(builder, monkeypatch, tmp_path):
    """Headers are where nvcc says, the runtime comes from NVIDIA's package of nvcc's version, once."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\necho '#$ TOP=/toolkit/bin/..' >&2\n"
        "echo '#$ gcc -D__CUDACC_VER_MAJOR__=13 -D__CUDACC_VER_MINOR__=0' >&2\n"
    )
    nvcc.chmod(0o755)
    asked = []

    def download(*command):
        asked.append(command[-1])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "runtime.whl", "w") as wheel:
            wheel.writestr("nvidia/cu13/lib/libcudart_static.a", "")

    monkeypatch.setattr(builder, "python", download)
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    for _ in range(2):
        headers, library = builder.cuda_for_aarch64(nvcc)
        assert headers == Path("/toolkit/include")
        assert (library / "libcudart_static.a").exists()
    assert asked == ["nvidia-cuda-runtime==13.0.*"]


def test_symbols_of_a_newer_libc_are_refused(builder, monkeypatch, tmp_path):
    told = 'x.whl is consistent with the following platform tag: "manylinux_2_34_x86_64".'
    monkeypatch.setattr(builder, "python", lambda *_: told)
    with pytest.raises(builder.BuildError, match="more than manylinux_2_28"):
        builder.check_symbols(tmp_path / "x.whl")
    monkeypatch.setattr(builder, "python", lambda *_: told.replace("2_34", "2_24"))
    builder.check_symbols(tmp_path / "x.whl")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Python of an environment with the wheel. What the wheel needs is borrowed from this one; the checkout is not."""
    folder = tmp_path_factory.mktemp("wheel")
    # Where scikit-build-core is at hand, nothing is fetched.
    options = ["--no-build-isolation"] if importlib.util.find_spec("scikit_build_core") else []
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "-w", folder / "dist", ROOT,
        env={**os.environ, "VIM_BUILD_CUDA": "0"})  # fmt: skip
    (wheel,) = (folder / "dist").glob("*.whl")
    assert re.fullmatch(r"vision_mamba-[\d.]+-py3-none-\w+\.whl", wheel.name)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


def environment(python: Path) -> dict[str, str]:
    """No compiler, no checkout: a PATH with Python only, and no PYTHONPATH."""
    return {"PATH": str(python.parent), "HOME": str(python.parents[1])}


@pytest.mark.slow
def test_native_kernels_serve(installed):
    code = (
        "import shutil, causal_conv1d_vim, vim; from mamba_ssm_vim.cpu_library import library as scan;"
        "from causal_conv1d_vim.conv.cpu import library as conv; import timm, torch;"
        "assert not any(map(shutil.which, ('cc', 'gcc', 'c++', 'g++', 'clang', 'cl')));"
        "print(vim.__file__, conv.instruction_set, scan.instruction_set);"
        "print(timm.create_model('vim_nano_patch4_32').eval()(torch.zeros(1, 3, 32, 32)).shape)"
    )
    told = run(installed, "-c", code, env=environment(installed), cwd=installed.parent)
    file, *sets = told.splitlines()[0].split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert len(set(sets)) == 1
    assert sets[0] in ("baseline", "avx2", "avx512")
    assert "torch.Size([1, 10])" in told


@pytest.mark.slow
def test_operators(installed, tmp_path):
    """The operators' own tests, copied away from the checkout's packages."""
    for folder in ("causal-conv1d/tests", "mamba-1p1p1/tests", "tests/support"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    told = run(
        installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *TESTS,
        env=environment(installed), cwd=tmp_path,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", told)
    assert passed is not None
    assert int(passed[1]) > 100, told[-2000:]
