"""Draw boxes and masks of what is found in an image: `python det/demo.py IMAGE CONFIG CHECKPOINT --out FILE.png`."""

import sys
from functools import partial

from vim.dense.demo import demo
from vim.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(partial(demo, "det")))
