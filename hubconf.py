"""Entry points of torch.hub: every model that this repository registers with timm, by its name.

    torch.hub.load("/path/to/this/repository", "vim_tiny_patch16_224", source="local", pretrained=False)

`pretrained=True` downloads the published weights; other arguments are those of `timm.create_model`.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

dependencies = ["torch", "torchvision", "timm", "numpy", "yaml"]

# A checkout that was not installed: torch.hub puts only its top folder on the path.
sys.path += [str(Path(__file__).parent / folder) for folder in ("mamba-1p1p1", "causal-conv1d")]

import timm  # noqa: E402
from torch import nn  # noqa: E402

import vim  # noqa: E402, F401  registers the models


def _entry(name: str) -> Callable[..., nn.Module]:
    create = partial(timm.create_model, name)
    create.__doc__ = f"{name}: takes pretrained, checkpoint_path and the arguments of VisionMamba."
    return create


_names = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vim.")]
globals().update({name: _entry(name) for name in _names})
