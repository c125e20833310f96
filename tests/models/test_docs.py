"""Every block of Python in docs/model.md, deploy.md, tutorials.md and migration.md runs."""

import re
import warnings
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_blocks() -> None:
    assert len(BLOCKS) >= 7
    assert "import vim" in BLOCKS[0]


@pytest.mark.slow
def test_blocks(tmp_path: Path, monkeypatch) -> None:
    """In the page's order and one namespace, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript's end
        for block in BLOCKS:
            if "export_onnx" not in block:
                exec(compile(block, "docs/model.md", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("tutorials", 4), ("migration", 1)])
def test_blocks_of_other_pages(name: str, count: int) -> None:
    page = Path(__file__).parents[2] / "docs" / f"{name}.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == count
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
def test_onnx_block(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("onnxscript", reason="needs the export extra")
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in BLOCKS if "export_onnx" in b)
    exec(compile(BLOCKS[0] + block, "docs/model.md", "exec"), {})
    assert (tmp_path / "vim.onnx").stat().st_size > 100_000


@pytest.mark.slow
def test_deployment(tmp_path: Path, monkeypatch) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the export extra")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "deploy.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (block,) = (b for b in blocks if "export_onnx" in b)
    exec(compile(block, "docs/deploy.md", "exec"), {})
