"""Detection with torchvision's Mask R-CNN on Vim, without OpenMMLab:
`python det/torchvision_train.py --data shapes`; see --help."""

import sys
from functools import partial

from vim.dense.standalone.cli import run
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(run, "det")))
