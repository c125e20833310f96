"""Random numbers from tuples of integers: the same key always gives the same numbers."""

import random
from collections.abc import Callable

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


def seed_sample(*key: int) -> None:
    """The same for the CPU only, and faster: torch.manual_seed takes longer than decoding a small image."""
    _seed(key, torch.default_generator.manual_seed)
