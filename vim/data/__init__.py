"""Data sets, transforms and loaders."""

from vim.data.datasets import build_datasets
from vim.data.images import LEFT_OUT, sample_shape
from vim.data.loaders import build_loaders
from vim.data.seeding import seed_all

__all__ = ["LEFT_OUT", "build_datasets", "build_loaders", "sample_shape", "seed_all"]
