"""Data sets, transforms and loaders."""

from vim.data.datasets import DATA_SETS, INAT_CATEGORIES, build_datasets
from vim.data.loaders import build_loaders, seed_all

__all__ = ["DATA_SETS", "INAT_CATEGORIES", "build_datasets", "build_loaders", "seed_all"]
