"""Segmentation with the UperNet or Mask2Former of transformers on Vim, without OpenMMLab:
`python seg/transformers_train.py --data shapes`; see --help."""

import sys
from functools import partial

from vim.dense.standalone.cli import run
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(run, "seg")))
