"""Parameters, FLOPs and speed of a config: `python det/benchmark.py det/configs/NAME.py --shape 512 512`."""

import sys
from functools import partial

from vim.dense.benchmark import benchmark
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(benchmark, "det")))
