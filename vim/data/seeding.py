"""Random numbers from tuples of integers: the same key gives the same numbers, whatever was drawn before."""

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch


def _words(key: tuple[int, ...], count: int) -> list[int]:
    return [int(w) for w in np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(count)]


def seed_of(*key: int) -> int:
    """One seed of 32 bits from a tuple of integers."""
    return _words(key, 1)[0]


def _seed(key: tuple[int, ...], seed_torch: Callable[[int], object]) -> None:
    words = _words(key, 3)
    random.seed(words[0])
    np.random.seed(words[1])
    seed_torch(words[2])


def seed_all(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators (of every device) from a tuple of integers."""
    _seed(key, torch.manual_seed)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators from `key` inside the block, and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        # Not torch.manual_seed: on its way to the devices it formats the call stack, slower than a small image is.
        _seed(key, torch.default_generator.manual_seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
