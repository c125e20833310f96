"""Vision Mamba against DeiT by resolution on this machine, as in figure 1 of arXiv 2401.09417.

    bash scripts/benchmark.sh [--seconds 600] [--sizes 224 512 ...] [--out output/benchmark]

Inference of Vim-Ti and DeiT-Ti with fused and with plain attention: images per second, peak memory, FLOPs; in float32
and bfloat16; eager, compiled and, on a GPU, replayed from a CUDA graph. The models of a case run alternately in one
process and their median times are taken. Rows are appended to resolution.csv as they come: a second call measures what
is missing and draws resolution.png anew. On a CPU peak memory is what one eager pass adds to a fresh process.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from model_cpu import DTYPES, build, peak_memory
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import append_rows, device_name, read_rows
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = (224, 384, 512, 640, 738, 1024, 1248)
NAMES = {
    "vim": "Vim-Ti",
    "deit_fused": "DeiT-Ti, fused attention",
    "deit_plain": "DeiT-Ti, plain attention",
}
COLUMNS = (
    "machine", "size", "batch", "dtype", "mode", "model", "ms", "images_s", "over_deit_fused", "peak_mib", "gflops",
    "note",
)  # fmt: skip
KEY = ("machine", "size", "batch", "dtype", "mode", "model")


def machine(device: str) -> str:
    """The device in words: the GPU's name, or the processor's and how many threads are used."""
    return device_name(device) + (f", {torch.get_num_threads()} threads" if device == "cpu" else "")


def gflops(name: str, size: int) -> float:
    """Billions of operations per image, counted without computing. Fused attention does what plain attention does."""
    model = build("vim" if name == "vim" else "deit_plain", size, torch.float32).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 1e9


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def prepared(name: str, size: int, batch: int, dtype: str, mode: str, device: str) -> Callable[[], object]:
    """One inference, warmed up, as a function to time."""
    model = build(name, size, DTYPES[dtype]).to(device).eval()
    images = torch.randn(batch, 3, size, size, dtype=DTYPES[dtype], device=device)
    call = torch.compile(model) if mode == "compiled" else model

    def run() -> object:
        with torch.no_grad():
            return call(images)

    run()
    return captured(run) if mode == "graph" else run


def seconds_of(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size: int, batch: int, dtype: str, mode: str, device: str, seconds: float) -> list[dict]:
    """The rows of one case; a model that does not fit has a note and no figures."""
    runs, notes, peaks = {}, {}, {}
    for name in NAMES:
        try:
            if device == "cuda":
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            runs[name] = prepared(name, size, batch, dtype, mode, device)
            if device == "cuda":
                runs[name]()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except (torch.OutOfMemoryError, MemoryError):
            notes[name] = "out of memory"
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + seconds
    while runs and (len(next(iter(times.values()))) < 3 or time.perf_counter() < stop):
        for name, run in runs.items():
            times[name].append(seconds_of(run, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    del runs
    rows = []
    for name in NAMES:
        row = {"machine": machine(device), "size": size, "batch": batch, "dtype": dtype, "mode": mode, "model": name}
        if name in medians:
            row |= {"ms": medians[name] * 1e3, "images_s": batch / medians[name], "peak_mib": peaks.get(name)}
            if "deit_fused" in medians:
                row["over_deit_fused"] = medians[name] / medians["deit_fused"]
            if device == "cpu" and mode == "eager":
                row["peak_mib"] = peak_memory(name, size, batch, "infer", dtype)
        rows.append(row | {"gflops": gflops(name, size), "note": notes.get(name)})
    return rows


def draw(rows: list[dict[str, str]], path: Path, dtype: str, mode: str) -> None:
    """Speed and memory against resolution, the machine in the caption."""
    rows = [row for row in rows if row["dtype"] == dtype and row["mode"] == mode and row["ms"]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, column, label in zip(
        axes, ("images_s", "peak_mib"), ("images per second", "peak memory (MiB)"), strict=True
    ):
        for name, title in NAMES.items():
            points = sorted((int(r["size"]), float(r[column])) for r in rows if r["model"] == name and r[column])
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=title)
        axis.set(xlabel="resolution (pixels)", ylabel=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    batches = sorted({int(row["batch"]) for row in rows})
    figure.suptitle(
        f"Inference, {dtype}, {mode}, batch {'/'.join(map(str, batches))}; {rows[0]['machine'] if rows else ''}",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = ("eager", "graph", "compiled") if device == "cuda" else ("eager", "compiled")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="sides of the images in pixels")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes))
    parser.add_argument("--batch", type=int, default=32 if device == "cuda" else 1, help="images per batch")
    parser.add_argument("--seconds", type=float, default=900, help="start no new case after this time")
    parser.add_argument("--case-seconds", type=float, default=2, help="time for each case, at least three rounds")
    parser.add_argument("--draw", nargs=2, metavar=("DTYPE", "MODE"), help="what is drawn; the first by default")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark"), help="folder of the CSV and PNG")
    args = parser.parse_args(argv)
    if args.batch < 1 or min(args.sizes) < 16:
        parser.error("--batch must be at least 1 and --sizes at least 16")
    args.out.mkdir(parents=True, exist_ok=True)
    path, start = args.out / "resolution.csv", time.monotonic()
    # Small cases first: a short run leaves a curve of one kind, not one point of each.
    cases = [(size, dtype, mode) for dtype in args.dtypes for mode in args.modes for size in sorted(args.sizes)]
    known = {tuple(row[k] for k in KEY) for row in read_rows(path)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left_out = 0
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(cases))
        for size, dtype, mode in cases:
            progress.update(task, description=f"{size} pixels, {dtype}, {mode}")
            key = tuple(map(str, (machine(device), size, args.batch, dtype, mode)))
            if any((*key, name) not in known for name in NAMES):
                if time.monotonic() - start < args.seconds:
                    append_rows(path, COLUMNS, measure(size, args.batch, dtype, mode, device, args.case_seconds))
                else:
                    left_out += 1
            progress.advance(task)
    dtype, mode = args.draw or (args.dtypes[0], args.modes[0])
    here = [r for r in read_rows(path) if r["machine"] == machine(device) and r["batch"] == str(args.batch)]
    draw(here, args.out / "resolution.png", dtype, mode)
    print(f"wrote {path} and {path.with_suffix('.png')}")
    if left_out:
        print(f"--seconds is used up: {left_out} of {len(cases)} cases are left for the next call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
