"""A trained model from a checkpoint, with all that is needed to show it pictures."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo

from vim.data.images import decode, limit_pixels
from vim.data.transforms import build_transform
from vim.engine import checkpoints
from vim.engine.arguments import parse_args
from vim.engine.build import build_model
from vim.engine.distributed import DistributedContext, choose_context
from vim.engine.inherited import class_names, continue_flags, head_size, known_config, load_weights
from vim.environment import check_kernels
from vim.errors import UserError
from vim.flags import Flags


@dataclasses.dataclass
class Opened:
    """A model on its device, in evaluation mode.

    Attributes:
        model: the model.
        args: flags of the run that trained it, and those given.
        context: device.
        transform: PIL image to normalised tensor (C, H, W).
        classes: names.
    """

    model: torch.nn.Module
    args: Flags
    context: DistributedContext
    transform: Callable[[Any], torch.Tensor]
    classes: list[str]

    def read(self, path: str | Path) -> torch.Tensor:
        """A picture as the model takes it, (C, H, W) on its device.

        Raises:
            UserError: it cannot be read.
        """
        return self.transform(decode(path, "L" if self.args.in_chans == 1 else "RGB")).to(self.context.device)


def _names(checkpoint: dict, num_classes: int) -> list[str]:
    """The checkpoint's own class names, ImageNet's for a thousand classes, or numbers."""
    if known := class_names(checkpoint):
        return known
    if num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(k).split(",")[0] for k in range(1000)]
    return [f"class {k}" for k in range(num_classes)]


def open_model(checkpoint: Path, argv: list[str]) -> Opened:
    """The model of a checkpoint of `main.py`, or of another program's with `--model` in `argv`.

    Args:
        checkpoint: the file.
        argv: flags of `main.py` beside `--eval` and `--resume`.

    Raises:
        UserError: a file that cannot be read, or weights of another model.
    """
    content = checkpoints.read(str(checkpoint), "")
    argv = ["--eval", "--resume", str(checkpoint), *argv]
    if checkpoints.is_own(content):
        args = continue_flags(content, argv)
    else:
        # Published files keep the flags of their run.
        named = argv[argv.index("--model") + 1] if "--model" in argv else getattr(content.get("args"), "model", None)
        if named is None:
            raise UserError(f"{checkpoint} does not name its model: pass --model")
        size = known_config(named).input_size if timm.is_model(str(named)) else (3, 224, 224)
        args = parse_args(argv, {"model": str(named), "in_chans": size[0], "input_size": size[-1]})
    context = choose_context(args)
    check_kernels(context.device.type)
    num_classes = head_size(args, content)
    model = build_model(args, num_classes)
    load_weights(model, content)
    model.to(context.device).eval()
    limit_pixels(args.max_image_pixels)
    return Opened(model, args, context, build_transform(False, args), _names(content, num_classes))
