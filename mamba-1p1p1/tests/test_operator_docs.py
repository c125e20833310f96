"""Every Python block of docs/operators.md and docs/language-model.md runs.

The first of each does so in its own process, since it changes what imports mean.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("first", [True, False], ids=["compat", "others"])
@pytest.mark.parametrize(("document", "count"), [("operators.md", 6), ("language-model.md", 3)])
def test_blocks_run(document, count, first, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / document).read_text(), flags=re.DOTALL)
    assert len(blocks) == count
    code = "\n".join(f"exec({block!r}, {{}})" for block in (blocks[:1] if first else blocks[1:]))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
