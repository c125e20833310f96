"""The training of the small language model: what it writes, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_language_model.py"
PAGE = "# A page\n\n<!-- training -->\nold\n<!-- end of training -->\n\nthe rest\n"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_writes_picture_and_section(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    done = run("--seconds", 1, "--assets", tmp_path, "--document", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("# A page\n\n<!-- training -->\nA model of 4 blocks")
    assert text.endswith("```\n<!-- end of training -->\n\nthe rest\n")
    assert "```text\nThe" in text
    assert (tmp_path / "language-model.png").read_bytes().startswith(b"\x89PNG")
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "held out " in line]
    # An untrained model's scores are nearly equal: ln(96) = 4.6 nats per character. One step takes it below 4.5.
    assert losses[-1] < losses[0] < 4.6


def test_a_document_without_the_section_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    done = run("--seconds", 1, "--assets", tmp_path, "--document", page)
    assert done.returncode == 2
    lines = "<!-- training --> and <!-- end of training -->"
    assert done.stderr == f"error: {page} has no lines {lines} to write between\n"
    assert not (tmp_path / "language-model.png").exists()
