"""Packages depend on one another in one direction, no module imports itself through others, versions agree."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "causal_conv1d_vim": ROOT / "causal-conv1d",
    "mamba_ssm_vim": ROOT / "mamba-1p1p1",
    "vim": ROOT,
    "det": ROOT,
    "seg": ROOT,
}
# Whom each may import, itself aside.
ALLOWED = {
    "causal_conv1d_vim": set(),
    "mamba_ssm_vim": {"causal_conv1d_vim"},
    "vim": {"causal_conv1d_vim", "mamba_ssm_vim"},
    "det": {"vim"},
    "seg": {"vim"},
}


def source_files() -> dict[str, Path]:
    """Every module's dotted name and file. vim/scripts is a link to scripts/, no part of the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if "scripts" not in parts:
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = source_files()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, everywhere: bool) -> list[ast.Import | ast.ImportFrom]:
    """Import statements: those that run when the module is imported, or also those inside functions."""
    found, waiting = [], [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.append(node)
            elif is_type_checking(node):
                continue
            elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                waiting.append(node)
    return found


def imported(module: str, path: Path, everywhere: bool = False) -> set[str]:
    """Names of what a module imports; `from package import name` counts as the submodule where there is one."""
    names = set()
    for node in imports(ast.parse(path.read_text()), everywhere):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, f"{module}: relative import in line {node.lineno}"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            names.add(submodule if submodule in FILES else node.module)
    return names


def circle(files: dict[str, Path]) -> list[str]:
    """Modules that import each other in a ring, [] if there is none."""
    graph = {module: imported(module, path) & files.keys() - {module} for module, path in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle_of_imports():
    assert len(FILES) > 60
    assert not circle(FILES)


def test_a_circle_is_found(tmp_path):
    texts = {"a": "import b", "b": "if True:\n    from c import x", "c": "def f():\n    import a"}
    files = {name: tmp_path / f"{name}.py" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    assert circle(files) == []
    assert imported("c", files["c"], everywhere=True) == {"a"}
    files["c"].write_text("import a")
    assert sorted(set(circle(files))) == ["a", "b", "c"]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_depend_in_one_direction(package):
    for module, path in FILES.items():
        if module.split(".")[0] != package:
            continue
        tops = {name.split(".")[0] for name in imported(module, path, everywhere=True)}
        assert tops & ALLOWED.keys() <= ALLOWED[package] | {package}, module
        if package in ("causal_conv1d_vim", "mamba_ssm_vim"):
            allowed = {"torch", "triton", "numpy", *ALLOWED, *sys.stdlib_module_names}
            if module == "mamba_ssm_vim.utils.hf":  # weights of language models
                allowed |= {"safetensors", "huggingface_hub"}
            assert tops <= allowed, f"{module} imports {tops - allowed}"


def test_tests_follow_the_packages():
    for folder, forbidden in (("causal-conv1d", {"mamba_ssm_vim", "vim"}), ("mamba-1p1p1", {"vim"})):
        for path in (ROOT / folder / "tests").rglob("*.py"):
            tops = {name.split(".")[0] for name in imported(path.stem, path, everywhere=True)}
            assert not tops & forbidden, path


def test_versions_agree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_words_are_those_of_the_field():
    """docs/architecture.md has the glossary; these were private names and phrases for what it calls otherwise."""
    private = r"\b(Keeper|Objective|put_weights|poles|made again|made-up|to be had)\b"
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.suffix not in (".py", ".md", ".cpp", ".cu", ".h", ".sh") or path == Path(__file__).resolve():
            continue
        if not any(part.startswith(".") or part in ("build", "shared", "output") for part in parts):
            found = re.search(private, path.read_text())
            assert found is None, f"{path}: {found[0]}"


def test_packages_say_that_they_are_typed():
    for package in ("causal_conv1d_vim", "mamba_ssm_vim", "vim"):
        assert (FOLDERS[package] / package / "py.typed").is_file()
