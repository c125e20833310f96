"""Draw the classes of all pixels over an image: `python seg/demo.py IMAGE CONFIG CHECKPOINT --out FILE.png`."""

import sys
from functools import partial

from vim.dense.demo import demo
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(demo, "seg")))
