"""The published module name, for code written against it."""

from vim.models.registry import *  # noqa: F403  every registered entry point, under its published name
from vim.models.vision_mamba import VisionMamba

__all__ = ["VisionMamba"]
