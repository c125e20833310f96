"""Data sets, transforms and loaders."""

from vim.data.datasets import DATA_SETS, FACTORY_PREFIXES, INAT_CATEGORIES, build_datasets
from vim.data.images import BAD_IMAGE, LEFT_OUT, MAX_IMAGE_PIXELS, sample_shape
from vim.data.loaders import build_loaders
from vim.data.seeding import seed_all

__all__ = [
    "BAD_IMAGE", "DATA_SETS", "FACTORY_PREFIXES", "INAT_CATEGORIES", "LEFT_OUT", "MAX_IMAGE_PIXELS", "build_datasets",
    "build_loaders", "sample_shape", "seed_all",
]  # fmt: skip
