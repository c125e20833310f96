"""Evaluate segmentation (mmseg 1) with a Vim backbone: `python seg/test.py seg/configs/NAME.py CHECKPOINT`."""

import sys
from functools import partial

from vim.dense.cli import evaluate
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(evaluate, "seg")))
