"""Vision Mamba models, registered with timm on import."""

from vim.models import registry, zoo
from vim.models.checkpoint import CheckpointError, extract_state_dict, load_checkpoint, load_into
from vim.models.published import from_published
from vim.models.vision_mamba import VisionMamba

__all__ = [
    "CheckpointError",
    "VisionMamba",
    "extract_state_dict",
    "from_published",
    "load_checkpoint",
    "load_into",
    "registry",
    "zoo",
]
