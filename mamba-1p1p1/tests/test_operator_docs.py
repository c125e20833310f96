"""Every Python block of docs/operators.md runs, each in a process of its own since one of them changes imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/operators.md").read_text(), flags=re.DOTALL
)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number):
    result = subprocess.run([sys.executable, "-c", BLOCKS[number]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
