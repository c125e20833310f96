"""Whole models on a CPU: VisionMamba against timm's DeiT with fused and with plain attention.

    python benchmarks/model_cpu.py [--quick] [--cases 224x8-infer ...] [--out output/benchmarks]

The models of a case run alternately in one process and their median times are compared; peak memory comes from a fresh
process each. All cases take about five minutes on two cores. Prints a table, writes model_cpu.csv and model_cpu.png;
with --cases, rows of other cases that the CSV already holds are kept.
"""

import argparse
import contextlib
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
from mamba_ssm_vim.cpu_library import library
from rich.console import Console
from rich.table import Table

import vim  # noqa: F401  (registers the models)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WITH_PLAIN, FUSED_ONLY = ("vim", "deit_fused", "deit_plain"), ("vim", "deit_fused")
# Name: image size, batch, mode, models, dtypes. "vim_reference" is VisionMamba on the pure PyTorch backend.
CASES = {
    "224x1-infer": (224, 1, "infer", ("vim", "vim_reference", "deit_fused"), ("fp32",)),
    "224x8-infer": (224, 8, "infer", WITH_PLAIN, ("fp32", "bf16")),
    "224x8-train": (224, 8, "train", FUSED_ONLY, ("fp32", "bf16")),
    "512x2-infer": (512, 2, "infer", WITH_PLAIN, ("fp32", "bf16")),
    "1248x1-infer": (1248, 1, "infer", WITH_PLAIN, ("fp32", "bf16")),
}
QUICK = ("224x8-infer", "224x8-train")


def build(name: str, size: int, dtype: torch.dtype) -> torch.nn.Module:
    """A tiny model for square images of `size` pixels."""
    torch.manual_seed(0)
    if name.startswith("vim"):
        model = timm.create_model("vim_tiny_patch16_224", img_size=size)
    else:
        model = timm.create_model("deit_tiny_patch16_224", img_size=size)
        for block in model.blocks:
            block.attn.fused_attn = name == "deit_fused"
    # A, D and the step's bias of the scan stay float32 inside the model, whatever the weights are.
    return model.to(dtype)


def run_once(name: str, model: torch.nn.Module, images: torch.Tensor, mode: str) -> None:
    """One inference, or one forward and backward pass."""
    with use_backend("reference") if name == "vim_reference" else contextlib.nullcontext():
        if mode == "infer":
            with torch.inference_mode():
                model(images)
        else:
            model.zero_grad(set_to_none=True)
            model(images).float().square().mean().backward()


def timed(name: str, model: torch.nn.Module, images: torch.Tensor, mode: str) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run_once(name, model, images, mode)
    return time.perf_counter() - start


def compare(size: int, batch: int, mode: str, dtype: str, names: tuple[str, ...], seconds: float) -> dict[str, float]:
    """Median seconds of each model, run in turn for about `seconds` and at least three rounds."""
    models = {name: build(name, size, DTYPES[dtype]).train(mode == "train") for name in names}
    images = torch.randn(batch, 3, size, size, dtype=DTYPES[dtype])
    for name, model in models.items():
        run_once(name, model, images, mode)
    times: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + seconds
    while len(times[names[0]]) < 3 or time.perf_counter() < stop:
        for name, model in models.items():
            times[name].append(timed(name, model, images, mode))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(name: str, size: int, batch: int, mode: str, dtype: str) -> float:
    """MiB that one pass adds to a fresh process that holds the model: its peak less what it held before."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([name, size, batch, mode, dtype])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def _resident(field: str) -> float:
    """MiB now resident (VmRSS) or at most so far (VmHWM).

    Not from `getrusage` where /proc exists: its peak outlives exec, so that a child starts with its parent's.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def child(name: str, size: int, batch: int, mode: str, dtype: str) -> None:
    """Body of the fresh process."""
    model = build(name, size, DTYPES[dtype]).train(mode == "train")
    images = torch.randn(batch, 3, size, size, dtype=DTYPES[dtype])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    run_once(name, model, images, mode)
    sys.stdout.write(f"{_resident('VmHWM') - before}\n")


def measure(case: str, seconds: float) -> list[dict]:
    """Rows of one case."""
    size, batch, mode, names, dtypes = CASES[case]
    rows = []
    for dtype in dtypes:
        medians = compare(size, batch, mode, dtype, names, seconds)
        for name, value in medians.items():
            row = {"case": case, "dtype": dtype, "model": name, "ms": value * 1e3, "images_s": batch / value}
            row |= {"over_deit_fused": value / medians["deit_fused"]}
            row |= {"peak_mib": peak_memory(name, size, batch, mode, dtype)}
            rows.append(row | {"threads": torch.get_num_threads(), "isa": library.instruction_set})
    return rows


def read_rows(path: Path) -> list[dict]:
    """Rows of an earlier run, or none."""
    if not path.exists():
        return []
    kinds = {"ms": float, "images_s": float, "over_deit_fused": float, "peak_mib": float, "threads": int}
    with open(path, newline="") as file:
        return [{k: kinds.get(k, str)(v) for k, v in row.items()} for row in csv.DictReader(file)]


def summary(rows: list[dict]) -> list[str]:
    """What the rows say about Vim in bfloat16 and about the reference backend."""
    lines = []
    for case in CASES:
        ms = {(r["model"], r["dtype"]): r["ms"] for r in rows if r["case"] == case}
        if ("vim", "bf16") in ms:
            best = min(v for (name, _), v in ms.items() if name == "deit_fused")
            lines.append(
                f"{case}: Vim in bf16 takes {ms['vim', 'bf16'] / best:.2f}x DeiT (fused attention) in its better dtype"
            )
        if ("vim_reference", "fp32") in ms:
            ratio = ms["vim_reference", "fp32"] / ms["vim", "fp32"]
            lines.append(f"{case}: the reference backend takes {ratio:.1f}x the native one")
    return lines


def plot(rows: list[dict], path: Path) -> None:
    """Bars of every model's time over DeiT's with fused attention."""
    figure, axes = plt.subplots(figsize=(9, 4))
    groups = list(dict.fromkeys((r["case"], r["dtype"]) for r in rows))
    names = list(dict.fromkeys(r["model"] for r in rows))
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        heights = {(r["case"], r["dtype"]): r["over_deit_fused"] for r in rows if r["model"] == name}
        places = [i + width * (offset - (len(names) - 1) / 2) for i, g in enumerate(groups) if g in heights]
        axes.bar(places, [heights[g] for g in groups if g in heights], width * 0.92, label=name)
    axes.axhline(1.0, ls="--", c="grey", lw=0.8)
    axes.set_xticks(range(len(groups)), ["\n".join(g) for g in groups], fontsize=7)
    axes.set(ylabel="time over DeiT with fused attention", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"some of {', '.join(CASES)}")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time for each case and dtype, at least three rounds"
    )
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"), help="folder of the CSV and PNG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return
    chosen = args.cases or (QUICK if args.quick else tuple(CASES))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "model_cpu.csv"
    kept = [row for row in read_rows(path) if args.cases and row["case"] not in chosen]
    rows = kept + [row for case in chosen for row in measure(case, args.seconds)]
    rows.sort(key=lambda row: list(CASES).index(row["case"]))

    console = Console(width=140)
    table = Table(title=f"tiny models, {torch.get_num_threads()} threads, {library.instruction_set or 'no library'}")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    for line in summary(rows):
        console.print(line)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    plot(rows, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
