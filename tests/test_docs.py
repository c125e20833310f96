"""README and docs/: links lead somewhere, pictures are drawn by their script, quoted messages are the program's."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Messages of other projects that docs/troubleshooting.md explains.
FOREIGN = {
    "undefined symbol", "incompatible function arguments", "selective_scan_cuda", "causal_conv1d_cuda",
    "Mamba.__init__() got an unexpected keyword argument 'bimamba_type'", "size mismatch for pos_embed",
    "shape '[-1, 14, 14, 192]' is invalid", "CUDA out of memory", "DataLoader worker exited unexpectedly", "Bus error",
    "Address already in use", "Expected u.is_cuda() to be true", "torch.compile", "torch.export",
    "No module named 'pkg_resources'", "No module named 'selective_scan_cuda'", "No module named 'causal_conv1d_cuda'",
    "Loss is nan, stopping training",
}  # fmt: skip


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES[:2] + PAGES[3:], ids=lambda page: page.name)
def test_scripts_and_recipes_exist(page):
    for path in re.findall(
        r"(?<![\w/.])((?:scripts|benchmarks|det|seg|recipes)/[\w./-]+\.(?:py|sh|yaml))", page.read_text()
    ):
        assert (ROOT / path).is_file() or (ROOT / "vim" / path).is_file(), path


@pytest.mark.slow
def test_site(tmp_path):
    """A strict build, in which a warning is an error; links to files outside docs/ lead to copies of them."""
    pytest.importorskip("mkdocstrings", reason="needs the docs extra")
    pytest.importorskip("material", reason="needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    for page in tmp_path.rglob("*.html"):
        if page.name != "404.html":  # served from any folder, so its links start at the root
            for target in re.findall(r'(?:href|src)="?([^"\s>#]+)', page.read_text()):
                if ":" not in target:
                    linked = page.parent / unquote(target)
                    assert linked.exists(), (page, target)
                    assert (linked / "index.html").exists() or linked.is_file(), (page, target)
    for name in ("assets/architecture-model.svg", "benchmarks/results/h200.csv", "NOTICE"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    api = "".join((tmp_path / "reference" / page / "index.html").read_text() for page in ("models", "mamba_ssm_vim"))
    for name in ("vim.models.VisionMamba", "vim.models.load_into", "mamba_ssm_vim.selective_scan"):
        assert f'id="{name}"' in api


def test_quoted_messages_are_in_the_sources():
    folders = ("causal-conv1d", "mamba-1p1p1", "vim")
    sources = [p.read_text() for folder in folders for p in (ROOT / folder).rglob("*.py") if "tests" not in p.parts]
    # Adjacent strings of one message are joined.
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join([*sources, (ROOT / "pyproject.toml").read_text()]))
    titles = re.findall(r"^\*\*(.+?)\.?\*\*", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = {q for title in titles for q in re.findall(r"`([^`]+)`", title)}
    assert quoted >= FOREIGN
    assert len(quoted - FOREIGN) >= 6
    for message in quoted - FOREIGN:
        for part in message.split("..."):
            assert part.strip(" ,") in text, message


def test_pictures_of_the_architecture_are_those_of_the_script(tmp_path):
    script = ROOT / "scripts" / "draw_architecture.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=120)
    for name in ("model", "packages", "image", "gradient"):
        words = [
            re.findall(r">([^<>\n]+)</text>", (folder / f"architecture-{name}.svg").read_text())
            for folder in (tmp_path, ROOT / "assets")
        ]
        assert words[0] == words[1]
        assert len(words[0]) > 5
        assert (ROOT / "assets" / f"architecture-{name}.png").is_file()


def test_every_picture_has_a_script():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## How to redraw a picture")[2]
    patterns, drawn = re.findall(r"^\| (?:other )?(`.+?`) \|", table, re.MULTILINE), set()
    for pattern in re.findall(r"`([^`]+)`", " ".join(patterns)):
        drawn |= {path.name for path in (ROOT / "assets").glob(pattern)}
    shown = {Path(target).name for page in PAGES for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())}
    assert len(shown) > 10
    assert shown <= drawn
    for script in re.findall(r"`python (\w+/\w+\.py)", table):
        assert (ROOT / script).is_file()


@pytest.mark.slow
def test_pictures_of_measurements(tmp_path):
    script = ROOT / "benchmarks" / "draw_results.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300)
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-sweep.png", "cpu_models.png", "cpu_scan.png"}
