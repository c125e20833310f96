"""Draw the learning curves of one or several runs: `python scripts/plot_run.py RUN [RUN ...] --output curves.png`."""

import argparse
import sys
from pathlib import Path

from vim.analysis.plots import plot_curves, read_log
from vim.errors import UserError


def main() -> int:
    """Read each run's log.txt and write one PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG to write")
    args = parser.parse_args()
    try:
        plot_curves({str(run): read_log(run / "log.txt") for run in args.runs}, args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
