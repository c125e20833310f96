"""Parameters, FLOPs and speed of a config: `python seg/benchmark.py seg/configs/NAME.py --shape 512 512`."""

import sys
from functools import partial

from vim.dense.benchmark import benchmark
from vim.dense.cli import run_main

if __name__ == "__main__":
    sys.exit(run_main(partial(benchmark, "seg")))
