"""Train detection (mmdet 3) with a Vim backbone: `python det/train.py det/configs/NAME.py`; see --help."""

import sys
from functools import partial

from vim.dense.cli import train
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(train, "det")))
