"""Build wheels that need no compiler where they are installed: one per platform, for every Python 3 and every torch.

The compiler is that of the PyPI package ziglang, which compiles for another system and for an older glibc than its own:

    pip install 'vision-mamba[wheels]'
    python scripts/build_wheels.py                      # Linux (x86_64 and aarch64), macOS and Windows, into dist/
    python scripts/build_wheels.py linux-x86_64 --cuda  # with the CUDA kernels, where nvcc and g++ are

With `linux-aarch64 --cuda` the nvcc of x86_64 and Debian's g++-aarch64-linux-gnu compile for aarch64.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CUDA_ARCHITECTURES = "80;90;100;120"
CUDA_HOST_COMPILERS = {"linux-x86_64": "g++", "linux-aarch64": "aarch64-linux-gnu-g++"}
CUDA_LIBRARIES = (("causal_conv1d_vim", "causal_conv1d_cuda"), ("mamba_ssm_vim", "mamba_ssm_cuda"))
LIBRARIES = (("causal_conv1d_vim", "vim_conv"), ("mamba_ssm_vim", "vim_mamba"), ("mamba_ssm_vim", "vim_onnxruntime"))


class Platform(NamedTuple):
    """What ziglang and pip call a platform, and how its shared libraries are named."""

    target: str
    tag: str
    library: str = "lib{}.so"


PLATFORMS = {
    "linux-x86_64": Platform("x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"),
    "linux-aarch64": Platform("aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64"),
    "macos-arm64": Platform("aarch64-macos.11.0", "macosx_11_0_arm64", "lib{}.dylib"),
    "windows-x86_64": Platform("x86_64-windows-gnu", "win_amd64", "lib{}.dll"),
}


class BuildError(Exception):
    """A wheel that cannot be made, or that is not what it should be."""


def python(*arguments: str | Path) -> str:
    """Run this Python.

    Returns:
        What it prints.

    Raises:
        BuildError: it fails.
    """
    done = subprocess.run([sys.executable, *arguments], text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, arguments[:4]))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def cuda_settings(name: str) -> dict[str, str]:
    """CMake's definitions for the CUDA kernels: nvcc with a g++ for the platform, linked for the older libc.

    Raises:
        BuildError: there is no nvcc, no such g++, or the CUDA runtime for aarch64 cannot be had.
    """
    compilers = {each: shutil.which(each) for each in ("nvcc", CUDA_HOST_COMPILERS[name])}
    for each, path in compilers.items():
        if path is None:
            raise BuildError(f"--cuda needs {each} on the PATH")
    nvcc, host = compilers.values()
    nvcc = Path(nvcc).resolve()
    settings = {
        "VIM_BUILD_CUDA": "ON",
        "VIM_CUDA_ARCHS": CUDA_ARCHITECTURES,
        "CMAKE_CUDA_COMPILER": str(nvcc),
        "CMAKE_CUDA_HOST_COMPILER": host,
    }
    if name == "linux-aarch64":
        # A toolkit for x86_64 lacks nothing but the runtime library; its headers serve both.
        headers, library = cuda_for_aarch64(nvcc)
        settings["CMAKE_CUDA_FLAGS"] = f"-I{headers} -L{library}"
        settings["CMAKE_SHARED_LINKER_FLAGS"] = f"-s -L{library}"
    return settings


def cuda_for_aarch64(nvcc: Path) -> tuple[Path, Path]:
    """The folders of the toolkit's headers, and of the CUDA runtime that NVIDIA packages for aarch64 and its version.

    Raises:
        BuildError: nvcc does not tell where it is, or the package cannot be had.
    """
    plan = [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]  # prints its settings
    told = subprocess.run(plan, text=True, capture_output=True, check=False).stderr
    top, version = re.search(r"TOP=(.+)", told), re.search(r"__CUDACC_VER_MAJOR__=(\d+).+MINOR__=(\d+)", told)
    if top is None or version is None:
        raise BuildError(f"{nvcc} does not tell where its headers are:\n{told[-2000:]}")
    release = f"{version[1]}.{version[2]}"
    folder = ROOT / "build" / "wheels" / f"cuda-{release}-aarch64"
    if not (found := sorted(folder.rglob("libcudart_static.a"))):
        with tempfile.TemporaryDirectory() as download:
            python("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", download,
                   "--platform", "manylinux2014_aarch64", f"nvidia-cuda-runtime=={release}.*")  # fmt: skip
            (wheel,) = Path(download).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(folder)
        found = sorted(folder.rglob("libcudart_static.a"))
    return Path(top[1].strip()).resolve() / "include", found[0].parent


def compile_wheel(name: str, output: Path, isolated: bool, cuda: bool) -> Path:
    """A wheel with the platform's libraries, still tagged as one for the machine that builds.

    Args:
        name: of the platform.
        output: an empty folder.
        isolated: whether pip installs the build's requirements by itself, in a place of their own.
        cuda: with the CUDA kernels.

    Raises:
        BuildError: the compiler is missing or fails, or the wheel came out without a library.
    """
    platform = PLATFORMS[name]
    settings = {
        "build-dir": ROOT / "build" / "wheels" / (f"{name}-cuda" if cuda else name),
        "cmake.define.CMAKE_TOOLCHAIN_FILE": ROOT / "cmake" / "zig.cmake",
        "cmake.define.VIM_ZIG_TARGET": platform.target,
        "cmake.define.VIM_ZIG_PYTHON": sys.executable,
        "install.strip": "false",  # by the linker, because the host's strip may not know the format
    }
    for key, value in (cuda_settings(name) if cuda else {"VIM_BUILD_CUDA": "OFF"}).items():
        settings[f"cmake.define.{key}"] = value
    options = [] if isolated else ["--no-build-isolation"]
    options += [f"--config-settings={key}={value}" for key, value in settings.items()]
    python("-m", "pip", "wheel", "--no-deps", "--quiet", *options, "--wheel-dir", output, ROOT)
    (wheel,) = output.glob("*.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if "/_lib/" in n}
    wanted = LIBRARIES + CUDA_LIBRARIES if cuda else LIBRARIES
    expected = {f"{package}/_lib/{platform.library.format(library)}" for package, library in wanted}
    if held != expected:
        raise BuildError(f"the wheel for {name} holds {sorted(held) or 'no libraries'}, expected {sorted(expected)}")
    return wheel


def build(name: str, output: Path, isolated: bool = True, cuda: bool = False) -> Path:
    """Build and check one platform's wheel.

    Args:
        name: key of `PLATFORMS`.
        output: folder to put it into.
        isolated, cuda: as for `compile_wheel`.

    Returns:
        The wheel.

    Raises:
        BuildError: it cannot be built, or needs more of the system than its tag promises.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheel = compile_wheel(name, Path(folder), isolated, cuda)
        python("-m", "wheel", "tags", "--remove", "--platform-tag", PLATFORMS[name].tag, wheel)
        (wheel,) = Path(folder).glob("*.whl")
        if name.startswith("linux"):
            check_symbols(wheel)
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, output))


def check_symbols(wheel: Path) -> None:
    """Ask auditwheel whether the libraries ask no more of a system than glibc 2.28 has.

    Raises:
        BuildError: they do.
    """
    told = python("-m", "auditwheel", "show", wheel)
    suits = re.search(r'"manylinux_2_(\d+)_\w+"', told)
    if suits is None or int(suits[1]) > 28 or "external shared libraries are required" in " ".join(told.split()):
        raise BuildError(f"{wheel.name} needs more than manylinux_2_28 offers:\n{told}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if a wheel could not be built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"all, or some of: {', '.join(PLATFORMS)}")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the wheels")
    parser.add_argument("--no-build-isolation", action="store_true", help="use the installed scikit-build-core")
    parser.add_argument(
        "--cuda", action="store_true", help=f"CUDA kernels too ({CUDA_ARCHITECTURES} and PTX), on Linux only"
    )
    args = parser.parse_args(argv)
    if args.cuda and not (args.platforms and set(args.platforms) <= CUDA_HOST_COMPILERS.keys()):
        parser.error(f"--cuda goes with {' and '.join(CUDA_HOST_COMPILERS)} only: name one or both")
    if unknown := set(args.platforms) - PLATFORMS.keys():
        parser.error(f"there is no platform {unknown.pop()}: choose some of {', '.join(PLATFORMS)}")
    try:
        for name in args.platforms or PLATFORMS:
            wheel = build(name, args.output, not args.no_build_isolation, args.cuda)
            print(f"{wheel}: {wheel.stat().st_size / 1e6:.2f} MB")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
