"""Make a small data set of overlapping coloured shapes: `python scripts/make_shapes.py output/shapes`; see --help."""

import sys

from vim.dense.shapes import main

if __name__ == "__main__":
    sys.exit(main())
