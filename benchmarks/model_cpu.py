"""Whole models on a CPU: VisionMamba against timm's DeiT with fused and with plain attention.

    python benchmarks/model_cpu.py [--quick] [--out output/benchmarks]

The models of a row run alternately in one process and their median times are compared; peak memory comes from a fresh
process each. Prints a table, writes model_cpu.csv and model_cpu.png.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import timm
import torch
from causal_conv1d_vim import use_backend
from mamba_ssm_vim.native import library
from rich.console import Console
from rich.table import Table

import vim  # noqa: F401  (registers the models)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = ("vim", "deit_fused", "deit_plain")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (image size, batch, mode)
CASES = [(224, 8, "infer"), (224, 8, "train"), (512, 2, "infer"), (1248, 1, "infer")]


def build(name: str, size: int, dtype: torch.dtype) -> torch.nn.Module:
    """A tiny model for square images of `size` pixels."""
    torch.manual_seed(0)
    if name == "vim":
        model = timm.create_model("vim_tiny_patch16_224", img_size=size)
    else:
        model = timm.create_model("deit_tiny_patch16_224", img_size=size)
        for block in model.blocks:
            block.attn.fused_attn = name == "deit_fused"
    # A, D and the step's bias of the scan stay float32 inside the model, whatever the weights are.
    return model.to(dtype)


def run_once(model: torch.nn.Module, images: torch.Tensor, mode: str) -> None:
    """One inference, or one forward and backward pass."""
    if mode == "infer":
        with torch.inference_mode():
            model(images)
    else:
        model.zero_grad(set_to_none=True)
        model(images).float().square().mean().backward()


def timed(model: torch.nn.Module, images: torch.Tensor, mode: str) -> float:
    start = time.perf_counter()
    run_once(model, images, mode)
    return time.perf_counter() - start


def compare(size: int, batch: int, mode: str, dtype: str, names: tuple[str, ...], seconds: float) -> dict[str, float]:
    """Median seconds of each model, run in turn for about `seconds` and at least three rounds."""
    models = {name: build(name, size, DTYPES[dtype]).train(mode == "train") for name in names}
    images = torch.randn(batch, 3, size, size, dtype=DTYPES[dtype])
    for model in models.values():
        run_once(model, images, mode)
    times: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + seconds
    while len(times[names[0]]) < 3 or time.perf_counter() < stop:
        for name, model in models.items():
            times[name].append(timed(model, images, mode))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(name: str, size: int, batch: int, mode: str, dtype: str) -> float:
    """MiB that one pass adds to a fresh process that holds the model: its peak less what it held before."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([name, size, batch, mode, dtype])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def child(name: str, size: int, batch: int, mode: str, dtype: str) -> None:
    """Body of the fresh process."""
    model = build(name, size, DTYPES[dtype]).train(mode == "train")
    images = torch.randn(batch, 3, size, size, dtype=DTYPES[dtype])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run_once(model, images, mode)
    sys.stdout.write(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}\n")


def reference_ratio(seconds: float) -> float:
    """How many times longer the reference backend takes for the same model, one 224-pixel image."""
    model, image = build("vim", 224, torch.float32).eval(), torch.randn(1, 3, 224, 224)
    times: dict[str, list[float]] = {"cpu": [], "reference": []}
    stop = time.perf_counter() + seconds
    while len(times["cpu"]) < 3 or time.perf_counter() < stop:
        for backend, values in times.items():
            with use_backend(backend):
                values.append(timed(model, image, "infer"))
    return statistics.median(times["reference"]) / statistics.median(times["cpu"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 and 224 pixels only")
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"), help="folder of the CSV and PNG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return
    seconds = 3.0 if args.quick else 5.0
    rows = []
    for size, batch, mode in CASES[:2] if args.quick else CASES:
        for dtype in ("fp32",) if args.quick else DTYPES:
            names = MODELS if mode == "infer" else MODELS[:2]
            medians = compare(size, batch, mode, dtype, names, seconds)
            for name, value in medians.items():
                row = {"pixels": size, "batch": batch, "mode": mode, "dtype": dtype, "model": name}
                row |= {"ms": value * 1e3, "images_s": batch / value, "over_deit_fused": value / medians["deit_fused"]}
                rows.append(row | {"peak_mib": peak_memory(name, size, batch, mode, dtype)})
    console = Console()
    title = f"tiny models, {torch.get_num_threads()} threads, {library.instruction_set or 'no native library'}"
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    if not args.quick:
        for size, _, mode in CASES:
            here = [r for r in rows if (r["pixels"], r["mode"]) == (size, mode)]
            deit = min(r["ms"] for r in here if r["model"] == "deit_fused")
            ours = next(r["ms"] for r in here if r["model"] == "vim" and r["dtype"] == "bf16")
            console.print(f"{size} {mode}: Vim in bf16 takes {ours / deit:.2f}x DeiT (fused) in its better dtype")
    console.print(f"reference backend over native, one 224-pixel image: {reference_ratio(seconds):.1f}x")

    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "model_cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = plt.subplots(figsize=(8, 4))
    groups = list(dict.fromkeys((r["pixels"], r["mode"], r["dtype"]) for r in rows))
    for offset, name in enumerate(MODELS):
        heights = {(r["pixels"], r["mode"], r["dtype"]): r["over_deit_fused"] for r in rows if r["model"] == name}
        places = [i + 0.27 * (offset - 1) for i, g in enumerate(groups) if g in heights]
        axes.bar(places, [heights[g] for g in groups if g in heights], 0.25, label=name)
    axes.set_xticks(range(len(groups)), ["\n".join(map(str, g)) for g in groups])
    axes.set(ylabel="time over DeiT with fused attention", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out / "model_cpu.png", dpi=120)
    console.print(f"wrote {args.out / 'model_cpu.csv'} and {args.out / 'model_cpu.png'}")


if __name__ == "__main__":
    main()
