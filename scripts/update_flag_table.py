"""Write the table of flags into docs/training.md: `python scripts/update_flag_table.py`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def updated(text: str) -> str:
    """The page with its table made anew."""
    from vim.engine.arguments import documentation

    before, rest = text.split("<!-- flags -->")
    after = rest.split("<!-- /flags -->")[1]
    return f"{before}<!-- flags -->\n{documentation()}\n<!-- /flags -->{after}"


if __name__ == "__main__":
    page = ROOT / "docs" / "training.md"
    page.write_text(updated(page.read_text()))
