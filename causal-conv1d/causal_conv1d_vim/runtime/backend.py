"""Which implementation of an operator runs: chosen by device and dtype at call time, or forced.

Every operator keeps a table of its backends (`registry.OpBackends`). The first one in the order of `BACKENDS` that can
serve the tensors is used; a reason to decline is logged once. `VIM_BACKEND=reference|cpu|triton|cuda`, or
`use_backend`, forces one, and a forced backend that cannot run raises.
"""

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

BACKENDS = ("cuda", "triton", "cpu", "reference")

_logger = logging.getLogger("vision_mamba.backend")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("vim_backend", default=None)
_said: set[tuple[str, str, str]] = set()


class Backend(Protocol):
    """A module with one implementation of an operator; `inputs` and `flags` are the operator's."""

    def why_not(self, *inputs: Any) -> str | None:
        """None if it can serve these inputs, else the reason in one clause."""

    def forward(self, *inputs: Any, **flags: Any) -> Any:
        """The operator's results, and what `backward` needs of them."""

    def backward(self, *gradients_and_inputs: Any, **flags: Any) -> Any:
        """The gradients of the inputs by name."""


class BackendError(RuntimeError):
    """A forced backend cannot run, or its name is unknown."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source} is {name!r}, but the backends are {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str | None:
    """Name of the backend forced by `use_backend` or else by the environment variable VIM_BACKEND, or None."""
    if (name := _forced.get()) is not None:
        return name
    if name := os.environ.get("VIM_BACKEND"):
        return _checked(name, "VIM_BACKEND")
    return None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every operator called inside the `with` block; None restores the automatic choice.

    Raises:
        BackendError: the name is unknown; or, inside the block, an operator's call cannot be served by that backend.
    """
    token = _forced.set(None if name is None else _checked(name, "the backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, names: Sequence[str], why_not: Callable[[str], str | None], forced: str | None) -> str:
    """Name of the backend that serves a call of `op`.

    Args:
        op: name of the operator, for messages.
        names: the backends that implement `op`, in order of preference.
        why_not: of a backend's name gives None, or the reason why it cannot run.
        forced: the name that `forced_backend` gives.

    Raises:
        BackendError: the forced backend declines.
    """
    if forced is not None:
        reason = why_not(forced) if forced in names else "it has no implementation of this operator"
        if reason is not None:
            raise BackendError(
                f"backend {forced!r} is forced but cannot run {op}: {reason}; unset VIM_BACKEND to choose automatically"
            )
        return forced
    declined = []
    for name in names:
        reason = why_not(name)
        if reason is None:
            # The reference is orders of magnitude slower, so say why it runs.
            level = logging.WARNING if name == "reference" else logging.INFO
            for other, why in declined:
                _say_once(level, op, other, why)
            return name
        declined.append((name, reason))
    raise BackendError(f"no backend can run {op}")


def _say_once(level: int, op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _said:
        _said.add((op, name, reason))
        _logger.log(level, "%s: backend %s declines: %s", op, name, reason)
