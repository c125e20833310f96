"""Evaluate detection (mmdet 3) with a Vim backbone: `python det/test.py det/configs/NAME.py CHECKPOINT`; see --help."""

import sys
from functools import partial

from vim.dense.cli import evaluate
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(evaluate, "det")))
