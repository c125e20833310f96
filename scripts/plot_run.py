"""Draw the learning curves of one or several runs: `python scripts/plot_run.py RUN [RUN ...] --output curves.png`."""

import argparse
import sys
from pathlib import Path

from vim.analysis.plots import plot_curves, read_log
from vim.errors import exit_status


def main() -> int:
    """Read each run's log.txt and write one PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG to write")
    args = parser.parse_args()

    def draw() -> None:
        plot_curves({str(run): read_log(run / "log.txt") for run in args.runs}, args.output)
        print(args.output)

    return exit_status(draw)


if __name__ == "__main__":
    sys.exit(main())
