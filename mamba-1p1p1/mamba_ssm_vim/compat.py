"""Importing this module makes `mamba_ssm` and `causal_conv1d` resolve to this project's packages.

    import mamba_ssm_vim.compat
    from mamba_ssm import Mamba                                           # mamba_ssm_vim.Mamba
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn

Every module `mamba_ssm.x.y` is the very module `mamba_ssm_vim.x.y`, whether or not the original packages are installed.

Raises:
    ImportError: one of the original packages has already been imported, and its users would keep it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

PACKAGES = {"mamba_ssm": "mamba_ssm_vim", "causal_conv1d": "causal_conv1d_vim"}


class _Loader(importlib.abc.Loader):
    """Returns a module that has already been imported under its own name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has stamped the alias's spec on the module; it keeps its own.
        module.__spec__ = self._spec


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package not in PACKAGES:
            return None
        name = f"{PACKAGES[package]}.{rest}" if rest else PACKAGES[package]
        found = importlib.util.find_spec(name)
        if found is None:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, _Loader(name), origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec


def _install() -> None:
    for alias, name in PACKAGES.items():
        present = sys.modules.get(alias)
        if present is not None and present is not sys.modules.get(name):
            raise ImportError(
                f"{alias} is already imported from {getattr(present, '__file__', 'elsewhere')}; "
                "import mamba_ssm_vim.compat before anything that imports mamba_ssm or causal_conv1d"
            )
    sys.meta_path.insert(0, _Finder())


_install()
