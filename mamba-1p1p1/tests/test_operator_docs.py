"""Every Python block of docs/operators.md runs; the first in its own process, since it changes what imports mean."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs/operators.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


@pytest.mark.parametrize("blocks", [BLOCKS[:1], BLOCKS[1:]], ids=["compat", "others"])
def test_blocks_run(blocks):
    assert len(BLOCKS) == 5
    code = "\n".join(f"exec({block!r}, {{}})" for block in blocks)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
