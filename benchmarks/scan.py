"""Rate of the native selective scan against length, width and threads, and against the machine's measured FMA rate.

    python benchmarks/scan.py [--quick] [--reference] [--out output/benchmarks]

Prints a table, writes scan.csv and scan.png. "Floor" is the time that the arithmetic alone would take at the measured
FMA rate: see docs/cpu-kernels.md for the counts. With --reference it also measures the pure PyTorch reference on one
core, for batches of 1 and 8 (columns over_reference_*: how many times faster the native scan is).
"""

import argparse
import csv
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from causal_conv1d_vim import use_backend
from mamba_ssm_vim.cpu_library import library
from mamba_ssm_vim.ops.selective_scan import cpu, selective_scan
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Vector operations of the multiply-add units per state update and, beside them, per (token, channel) for softplus, gate
# and skip. AVX-512 reduces and scales its exponential with two instructions of their own.
PER_UPDATE = {"avx512": 11, "avx2": 10, "baseline": 18}
PER_UPDATE_BACKWARD = {"avx512": 19, "avx2": 18, "baseline": 28}
PER_ELEMENT = 45
ISA_FLAGS = {  # as in CMakeLists.txt
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}
REFERENCE = ("over_reference_fwd", "over_reference_fwd_bwd")


def fma_rate(seconds: float = 0.2) -> float:
    """Multiply-add operations (vector lanes) per second on one core, the best of many short runs."""
    source = Path(__file__).with_name("fma_rate.cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fma_rate.so"
        flags = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC", *ISA_FLAGS[library.instruction_set]]
        includes = ["-I", str(source.parents[1] / "causal-conv1d/csrc")]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, *includes, str(source), "-o", str(path)], check=True)
        run = ctypes.CDLL(str(path)).fma_rate
    run.argtypes, run.restype = [ctypes.c_int64], ctypes.c_double
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        best = max(best, run(200_000) / (time.perf_counter() - start))
    return best


def median_seconds(run: Callable[[], object], seconds: float) -> float:
    """Median time of a call, over at least five calls and about `seconds`."""
    run()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(batch: int, seqlen: int, dim: int, states: int, threads: int, seconds: float, fma: float) -> dict:
    """One row of the table: forward and backward of one shape."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    xz = torch.randn(batch, seqlen, 2 * dim)
    delta = torch.randn(batch, seqlen, dim) - 3
    bc = torch.randn(batch, seqlen, 1, 2 * states)
    A = -torch.rand(dim, states) * states
    args = (xz[..., :dim], delta, A, bc[..., :states], bc[..., states:], torch.ones(dim), xz[..., dim:])
    args = (*args, torch.zeros(dim), None)
    flags = {"delta_softplus": True, "reverse": False}
    out, _, saved = cpu.forward(*args, **flags, save=True)
    forward = median_seconds(lambda: cpu.forward(*args, **flags), seconds)
    backward = median_seconds(lambda: cpu.backward(out, None, *args, saved, **flags), seconds)
    updates = batch * seqlen * dim * states
    isa = library.instruction_set
    elements = batch * seqlen * dim
    floor_f = (updates * PER_UPDATE[isa] + elements * PER_ELEMENT) / fma / threads
    floor_b = (updates * PER_UPDATE_BACKWARD[isa] + elements * PER_ELEMENT) / fma / threads
    return {
        "isa": isa, "batch": batch, "len": seqlen, "dim": dim, "states": states, "threads": threads,
        "fwd_ms": forward * 1e3, "fwd_Gupd_s": updates / forward / 1e9, "fwd_over_floor": forward / floor_f,
        "bwd_ms": backward * 1e3, "bwd_Gupd_s": updates / backward / 1e9, "bwd_over_floor": backward / floor_b,
    }  # fmt: skip


def over_reference(batch: int, seqlen: int, dim: int, states: int, seconds: float) -> dict[str, float]:
    """How many times longer the reference takes on one core: forward, and forward with backward through autograd."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    u, z, dout = (torch.randn(batch, seqlen, dim) for _ in range(3))
    B, C = (torch.randn(batch, seqlen, 1, states) for _ in range(2))
    inputs = [u, torch.randn(batch, seqlen, dim) - 3, -torch.rand(dim, states) * states, B, C, torch.ones(dim), z]
    inputs = [t.requires_grad_() for t in (*inputs, torch.zeros(dim))]

    def forward() -> torch.Tensor:
        return selective_scan(*inputs, delta_softplus=True)

    def inference() -> None:
        with torch.no_grad():
            forward()

    times = {}
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            both = median_seconds(lambda: torch.autograd.grad(forward(), inputs, dout), seconds)
            times[backend] = (median_seconds(inference, seconds), both)
    return {
        "over_reference_fwd": times["reference"][0] / times["cpu"][0],
        "over_reference_fwd_bwd": times["reference"][1] / times["cpu"][1],
    }


def call_overhead() -> float:
    """Microseconds of one eager `selective_scan` call on a single token and channel: everything but the work."""
    torch.set_num_threads(1)
    u, A = torch.randn(1, 1, 1), -torch.ones(1, 1)
    B = torch.randn(1, 1, 1, 1)
    with torch.no_grad():
        return median_seconds(lambda: selective_scan(u, u, A, B, B, delta_softplus=True), 0.5) * 1e6


def draw(rows: list[dict], path: Path) -> None:
    """Rates of one core against length, and the floor that a row's rate and its distance from the floor give."""
    kept = [r for r in rows if [int(r[k]) for k in ("batch", "dim", "states", "threads")] == [1, 384, 16, 1]]
    by_length = sorted({int(r["len"]): r for r in kept}.items())
    lengths = [length for length, _ in by_length]
    figure, axes = plt.subplots(figsize=(6, 4))
    for key, label in (("fwd_Gupd_s", "forward"), ("bwd_Gupd_s", "backward")):
        axes.plot(lengths, [float(r[key]) for _, r in by_length], "o-", label=label)
    floor = statistics.mean(float(r["fwd_Gupd_s"]) * float(r["fwd_over_floor"]) for _, r in by_length)
    axes.axhline(floor, ls="--", c="grey", label="FMA floor, forward")
    axes.set(xscale="log", xlabel="tokens", ylabel="G state updates / s, one core", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, under half a minute")
    parser.add_argument("--reference", action="store_true", help="also compare with the pure PyTorch reference")
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"), help="folder of the CSV and PNG")
    args = parser.parse_args()
    if library.reason is not None:
        raise SystemExit(f"no native library to measure: {library.reason}")
    cores = torch.get_num_threads()
    fma = fma_rate()
    seconds = 0.3 if args.quick else 1.0
    lengths = (197, 6085) if args.quick else (64, 197, 730, 2048, 6085)
    shapes = [(1, length, 384, 16, 1) for length in lengths]
    shapes += [(8, 197, 384, 16, 1), (2, 197, 384, 16, 1), (2, 197, 384, 16, cores), (1, 6085, 384, 16, cores)]
    if not args.quick:
        shapes += [(1, 197, dim, 16, 1) for dim in (192, 768, 1536)] + [(1, 197, 384, n, 1) for n in (8, 64)]
    rows = [measure(*shape, seconds, fma) for shape in shapes]
    if args.reference:
        for row in rows:
            compared = (row["len"], row["dim"], row["states"], row["threads"]) == (197, 384, 16, 1)
            compared = compared and row["batch"] in (1, 8)
            row |= over_reference(row["batch"], 197, 384, 16, seconds) if compared else dict.fromkeys(REFERENCE, "")

    console = Console(width=180)
    table = Table(title=f"selective scan, float32, {library.instruction_set}, {fma / 1e9:.0f} G multiply-adds/s a core")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    for batch, length in ((2, 197), (1, 6085)):
        same = {
            r["threads"]: r for r in rows if (r["batch"], r["len"], r["dim"], r["states"]) == (batch, length, 384, 16)
        }
        if cores > 1:
            ratio_f, ratio_b = (same[1][k] / same[cores][k] for k in ("fwd_ms", "bwd_ms"))
            console.print(f"batch {batch}, length {length}: {cores} threads over one {ratio_f:.2f}x / {ratio_b:.2f}x")
    console.print(f"eager call overhead: {call_overhead():.1f} µs")

    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "scan.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    draw(rows, args.out / "scan.png")
    console.print(f"wrote {args.out / 'scan.csv'} and {args.out / 'scan.png'}")


if __name__ == "__main__":
    main()
