"""Vision Mamba: importing this package registers the models with timm, and the operators with torch's FLOP counter."""

from vim.analysis import flops as _flops  # noqa: F401  registers
from vim.models import VisionMamba

__all__ = ["VisionMamba"]
