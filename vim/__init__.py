"""Vision Mamba: importing this package registers the models with timm."""

from vim.models import VisionMamba

__all__ = ["VisionMamba"]
