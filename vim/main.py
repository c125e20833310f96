"""Train, fine-tune and evaluate: `python main.py ...` in this folder, or `python -m vim.main ...` anywhere."""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run as a file, Python puts this folder first on the path, where its modules would shadow others of their names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from vim.engine.run import main

if __name__ == "__main__":
    sys.exit(main())
