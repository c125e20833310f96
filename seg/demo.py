"""Draw the classes of all pixels over an image: `python seg/demo.py IMAGE CONFIG CHECKPOINT --out FILE.png`."""

import sys
from functools import partial

from vim.dense.cli import run_main
from vim.dense.demo import demo

if __name__ == "__main__":
    sys.exit(run_main(partial(demo, "seg")))
