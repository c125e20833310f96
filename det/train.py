"""Train detection (mmdet 3) with a Vim backbone: `python det/train.py det/configs/NAME.py`; see --help."""

import sys
from functools import partial

from vim.dense.cli import run_main, train

if __name__ == "__main__":
    sys.exit(run_main(partial(train, "det")))
