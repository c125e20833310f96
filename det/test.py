"""Evaluate detection (mmdet 3) with a Vim backbone: `python det/test.py det/configs/NAME.py CHECKPOINT`; see --help."""

import sys
from functools import partial

from vim.dense.cli import evaluate, run_main

if __name__ == "__main__":
    sys.exit(run_main(partial(evaluate, "det")))
