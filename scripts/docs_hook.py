"""Hook of MkDocs: pages and files of the repository that lie outside docs/.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages of the site. Any other file that a page links to (a picture, a
table of measurements, a source file) is copied into the site, and the link leads to the copy.
"""

import re
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
_FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def _sources() -> dict[str, str]:
    """The path in the site of each page, by its path in the repository."""
    pages = {path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix() for path in _documents()}
    return {**pages, **PAGES}


def _documents() -> list[Path]:
    return [path for path in sorted((ROOT / "docs").rglob("*")) if path.is_file()]


def _target(link: str, source: str) -> str | None:
    """The path in the repository that a link of the page `source` means, or None for other links."""
    path = ((ROOT / source).parent / link).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_file() and path.is_relative_to(ROOT) else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and every file outside docs/ that a page links to."""
    sources = _sources()
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    linked = set()
    for source in sources:
        if source.endswith(".md"):
            text = _FENCE.sub("", (ROOT / source).read_text(encoding="utf-8"))
            linked |= {_target(link, source) for link in _LINK.findall(text)}
    for path in sorted(linked - set(sources) - {None}):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository into links between files of the site."""
    sources = _sources()
    (source,) = (path for path, name in sources.items() if name == page.file.src_uri)

    def rewrite(match: re.Match) -> str:
        target = _target(match[0], source)
        folder = Path(page.file.src_uri).parent.as_posix()
        return match[0] if target is None else relpath(sources.get(target, target), folder)

    parts = _FENCE.split(markdown)  # every second part is a block of code
    return "".join(part if i % 2 else _LINK.sub(rewrite, part) for i, part in enumerate(parts))
