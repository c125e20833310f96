"""Time one model in every runtime that docs/deploy.md describes, side by side, on a CPU.

Rounds go through all runtimes in turn, so that a disturbance meets all of them. Medians, and ratios to PyTorch.

python benchmarks/deploy.py --models vim_tiny_patch16_224 --batches 1 8 --threads 1
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch

import vim  # noqa: F401  registers the models
from vim.models.aoti import export_aoti
from vim.models.export import export_onnx
from vim.models.quantize import quantize_onnx, session

# Milliseconds of a run, and its logits where they can be had.
Runtime = Callable[[torch.Tensor], tuple[float, torch.Tensor | None]]
ROOT = Path(__file__).resolve().parents[1]


def timed(run: Callable[[torch.Tensor], torch.Tensor]) -> Runtime:
    """A function of images to logits as a runtime."""

    def runtime(images: torch.Tensor) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        logits = run(images)
        return 1e3 * (time.perf_counter() - start), logits

    return runtime


def autocast(model: torch.nn.Module) -> Runtime:
    """The model under autocast to bfloat16."""

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images).float()

    return timed(run)


def onnx_runtime(file: Path, threads: int) -> Runtime:
    """A session of ONNX Runtime."""
    run = session(file, threads)
    return timed(lambda images: torch.from_numpy(run.run(None, {"images": images.numpy()})[0]))


def without_python(package: Path, threads: int) -> Runtime:
    """scripts/classify_torch.cpp, which times itself: the median of five runs, on a random picture."""
    program, picture = package.with_name("classify_torch"), package.with_name("picture.ppm")
    subprocess.run(
        ["bash", ROOT / "scripts" / "build_classify_torch.sh", program],
        check=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip

    def run(images: torch.Tensor) -> tuple[float, None]:
        batch, channels, height, width = images.shape
        noise = np.random.default_rng(0).integers(0, 256, channels * height * width, dtype=np.uint8)
        picture.write_bytes(b"P6 %d %d 255\n" % (width, height) + noise.tobytes())
        settings = {"VIM_THREADS": str(threads), "VIM_BATCH": str(batch), "VIM_REPEAT": "4"}
        done = subprocess.run([program, package, picture], env=settings, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-2]), None

    return run


def runtimes(model: torch.nn.Module, folder: Path, args: argparse.Namespace) -> tuple[dict[str, Runtime], dict]:
    """The runtimes by name, and the size of each one's file in MB."""
    exact, native, int8 = (folder / f"{name}.onnx" for name in ("exact", "native", "int8"))
    export_onnx(model, native, native=True)
    images = np.random.default_rng(0).standard_normal((8, *model.input_shape), dtype=np.float32)
    quantize_onnx(native, int8, [images[i : i + 1] for i in range(8)])
    found: dict[str, Runtime] = {
        "PyTorch": timed(model),
        "PyTorch, bfloat16": autocast(model),
        "ONNX Runtime, native mixer": onnx_runtime(native, args.threads),
        "ONNX Runtime, native mixer, int8": onnx_runtime(int8, args.threads),
    }
    sizes = dict(zip(list(found)[2:], (f.stat().st_size / 1e6 for f in (native, int8)), strict=True))
    if "onnx" not in args.without:
        export_onnx(model, exact)
        found["ONNX Runtime, standard operators"] = onnx_runtime(exact, args.threads)
        sizes["ONNX Runtime, standard operators"] = exact.stat().st_size / 1e6
    if "aot" not in args.without:
        package = folder / "package.pt2"
        export_aoti(model, package)
        found["AOTInductor"] = timed(torch._inductor.aoti_load_package(str(package)))
        found["AOTInductor, C++"] = without_python(package, args.threads)
        sizes["AOTInductor"] = package.stat().st_size / 1e6
    return found, sizes


@torch.inference_mode()
def compare(found: dict[str, Runtime], images: torch.Tensor, rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Milliseconds of each round by runtime, and the relative distance of the logits from those of the first one."""
    times: dict[str, list[float]] = {name: [] for name in found}
    logits = {}
    for _ in range(rounds + 2):
        for name, run in found.items():
            milliseconds, logits[name] = run(images)
            times[name].append(milliseconds)
    exact = next(iter(logits.values()))
    return {n: t[2:] for n, t in times.items()}, {
        n: ((v - exact).norm() / exact.norm()).item() for n, v in logits.items() if v is not None
    }


def main(argv: list[str] | None = None) -> None:
    """Print a table for every model and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vim_tiny_patch16_224"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without", nargs="*", default=[], choices=["onnx", "aot"], help="runtimes to leave out")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for name in args.models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        with tempfile.TemporaryDirectory() as folder:
            found, sizes = runtimes(model, Path(folder), args)
            for batch in args.batches:
                images = torch.randn(batch, *model.input_shape)
                times, distances = compare(found, images, args.rounds)
                base = statistics.median(times["PyTorch"])
                print(f"{name}, batch {batch}, {args.threads} threads")
                for runtime, spent in times.items():
                    median = statistics.median(spent)
                    size = f"{sizes[runtime]:.1f} MB" if runtime in sizes else ""
                    distance = f"{distances[runtime]:.1e}" if runtime in distances else 7 * " "
                    print(f"  {runtime:34} {median:8.1f} ms  {median / base:5.2f}  {distance}  {size}")


if __name__ == "__main__":
    main()
