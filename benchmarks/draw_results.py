"""Draw assets/ from the measurements in benchmarks/results: `python benchmarks/draw_results.py [FOLDER]`."""

import sys
from pathlib import Path

import model_cpu
import resolution
import scan
from tables import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def gpu_sweep(path: Path) -> None:
    """The section "sweep" of h200.csv, in the columns of resolution.py."""
    names = {"Vim-Ti": "vim", "DeiT-Ti, SDPA": "deit_fused", "DeiT-Ti, plain attention": "deit_plain"}
    rows = [
        row | {"model": names[row["what"]], "machine": "NVIDIA H200", "mode": "eager"}
        | {"peak_mib": str(float(row["peak_gb"]) * 1e9 / 2**20)}
        for row in read_rows(RESULTS / "h200.csv") if row["section"] == "sweep"
    ]  # fmt: skip
    resolution.draw(rows, path, "bfloat16", "eager")


def cpu_models(path: Path) -> None:
    rows = read_rows(RESULTS / "cpu_models.csv")
    model_cpu.plot([row | {"over_deit_fused": float(row["over_deit_fused"])} for row in rows], path)


def cpu_scan(path: Path) -> None:
    scan.draw(read_rows(RESULTS / "cpu_scan.csv"), path)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "assets"
    gpu_sweep(folder / "gpu-sweep.png")
    cpu_models(folder / "cpu_models.png")
    cpu_scan(folder / "cpu_scan.png")


if __name__ == "__main__":
    main()
