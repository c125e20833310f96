"""The backends of an operator: one module each, present or not, and the choice among them per call."""

import importlib
import importlib.util
from typing import Any

from causal_conv1d_vim.runtime.backend import BACKENDS, Backend, choose, forced_backend


class OpBackends:
    """Backend modules of one operator, imported when first asked for.

    Args:
        op: name for messages.
        package: package that holds the modules `cuda`, `triton`, `cpu`; one that does not exist is not a candidate.
    """

    def __init__(self, op: str, package: str) -> None:
        self.op = op
        self._package = package
        self._modules: dict[str, Backend] = {}
        self._names = [
            name
            for name in BACKENDS
            if name == "reference" or importlib.util.find_spec(f"{package}.{name}") is not None
        ]
        self._without_gpu = [name for name in self._names if name not in ("cuda", "triton")]

    @property
    def names(self) -> list[str]:
        """Backends that implement the operator, in order of preference."""
        return list(self._names)

    def module(self, name: str) -> Backend:
        """The backend's module."""
        if name not in self._modules:
            self._modules[name] = importlib.import_module(f"{self._package}.{name}")
        return self._modules[name]

    def pick(self, *inputs: Any) -> str:
        """Name of the backend for a call with these inputs, which are the arguments of `why_not`."""
        # The choice takes a visible part of small calls on a CPU, so they do not ask the backends of GPUs.
        forced, names = forced_backend(), self._names
        if forced is None and inputs[0].is_cpu:
            names = self._without_gpu
            if self.module(names[0]).why_not(*inputs) is None:
                return names[0]
        return choose(self.op, names, lambda name: self.module(name).why_not(*inputs), forced)

    def fused(self, *inputs: Any) -> Backend | None:
        """The first backend with one kernel for a composed operator; None leaves the call to the operators inside."""
        forced = forced_backend()
        for name in self._names:
            if name != "reference" and forced in (None, name) and self.module(name).why_not(*inputs) is None:
                return self.module(name)
        return None
