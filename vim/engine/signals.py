"""Signals that ask a run to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(names: tuple[str, ...], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, `handler` gets the signals of these names; any that the system lacks (Windows) are left out."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
