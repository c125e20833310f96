"""Pictures of what a trained model does: `python -m vim.analysis NAME --checkpoint FILE [IMAGE...]`.

NAME is one of
  receptive-field  which pixels the middle of a feature map depends on, before and after training
  attention        the hidden attention of a block's scans over a picture
  attribution      integrated gradients and class activation maps of the predicted class
  components       the principal components of feature maps as colours
  decay            how many tokens the states of each block remember
  class-position   accuracy with the class token moved to other places
or "all". Without an IMAGE the pictures are those of the test set that the checkpoint was trained with.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vim.analysis import attention, attribution, features, pictures
from vim.analysis.opening import Opened, open_model
from vim.data import build_datasets
from vim.data.transforms import normalisation
from vim.engine.build import build_model
from vim.engine.run import set_up_logging
from vim.errors import UserError, exit_status

PANEL = 6
POSITIONS = 17


class Subject:
    """What is looked at: a model and its pictures."""

    def __init__(self, opened: Opened, images: list[Path], count: int, layer: int | None) -> None:
        self.opened, self.model = opened, opened.model
        depth = len(self.model.layers)
        self.layer = depth - 1 if layer is None else layer
        if not 0 <= self.layer < depth:
            raise UserError(f"--layer is {layer}, expected 0 to {depth - 1}")
        self.files, self.count = images, count

    @functools.cached_property
    def _dataset(self) -> Any:
        return build_datasets(self.opened.args)[1]

    def samples(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, C, H, W) of the test set, evenly spaced over it, and their classes (n,)."""
        dataset = self._dataset
        if not hasattr(dataset, "__len__"):
            raise UserError("the checkpoint's data set is a stream: give images, or --data-set and --data-path")
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
        samples = [dataset[int(i)] for i in chosen]
        images = torch.stack([image for image, _ in samples]).to(self.opened.context.device)
        return images, torch.tensor([int(target) for _, target in samples], device=images.device)

    def pictures(self, count: int) -> torch.Tensor:
        """The given images, or some of the test set, (n, C, H, W)."""
        if self.files:
            return torch.stack([self.opened.read(path) for path in self.files[:count]])
        return self.samples(count)[0]

    def shown(self, images: torch.Tensor) -> list[np.ndarray]:
        """Normalised images as arrays that matplotlib can show."""
        mean, std = (np.asarray(v).reshape(-1, 1, 1) for v in normalisation(self.opened.args.in_chans))
        arrays = (images.cpu().numpy() * std + mean).clip(0, 1).transpose(0, 2, 3, 1)
        return [array.squeeze(2) if array.shape[2] == 1 else array for array in arrays]


def _receptive_field(subject: Subject, path: Path) -> str:
    images = subject.pictures(subject.count)
    torch.manual_seed(0)
    untrained = build_model(subject.opened.args, len(subject.opened.classes)).to(images.device)
    models = {"untrained": untrained, "trained": subject.model}
    fields = {name: features.receptive_field(model, images, subject.layer) for name, model in models.items()}
    sides = {n: f"half of it in {features.side_that_holds(f, 0.5):.0%} of the side" for n, f in fields.items()}
    pictures.draw_fields(fields, sides, path)
    return "; ".join(f"{name}: {line}" for name, line in sides.items())


def _attention(subject: Subject, path: Path) -> str:
    image = subject.pictures(1)
    layout = subject.model._layout(subject.model.patch_embed.grid_size, 1)
    matrices = [m[0] for m in attention.hidden_attention(subject.model, image, subject.layer)]
    pictures.draw_attention(subject.shown(image)[0], matrices, layout.grid, layout.positions, path)
    return f"block {subject.layer}, {len(matrices)} scans of {matrices[0].shape[0]} tokens"


def _attribution(subject: Subject, path: Path) -> str:
    images = subject.pictures(PANEL)
    with torch.no_grad():
        confidence, classes = subject.model(images).float().softmax(1).max(1)
    gradients, missed = attribution.integrated_gradients(subject.model, images, classes)
    heat = attribution.class_activation(subject.model, images, classes)
    names = [f"{subject.opened.classes[k]} {p:.0%}" for k, p in zip(classes.tolist(), confidence.tolist(), strict=True)]
    maps = {"integrated gradients": gradients.sum(1), "class activation": heat}
    pictures.draw_attribution(subject.shown(images), names, maps, path)
    return f"the integral misses the logits by at most {missed.abs().max():.2g}"


def _components(subject: Subject, path: Path) -> str:
    images = subject.pictures(PANEL)
    layers = sorted({subject.layer // 3, 2 * subject.layer // 3, subject.layer})
    maps = {f"block {i}": features.component_maps(subject.model, images, i) for i in layers}
    pictures.draw_components(subject.shown(images), maps, path)
    return f"blocks {', '.join(map(str, layers))}"


def _decay(subject: Subject, path: Path) -> str:
    images = subject.pictures(subject.count)
    lengths = attention.decay_lengths(subject.model, images)
    tokens = subject.model.patch_embed.num_patches + subject.model.num_prefix_tokens
    pictures.draw_decay(lengths, tokens, path)
    medians = [float(torch.cat([s.flatten() for s in scans]).median()) for scans in lengths]
    return "median length by block: " + " ".join(f"{m:.1f}" for m in medians)


def _class_position(subject: Subject, path: Path) -> str:
    images, targets = subject.samples(subject.count)
    own = subject.model._layout(subject.model.patch_embed.grid_size, 1).positions
    last = subject.model.patch_embed.num_patches
    positions = sorted({*np.linspace(0, last, min(POSITIONS, last + 1)).astype(int).tolist(), *own})
    batches = list(zip(images.split(64), targets.split(64), strict=True))
    found = features.accuracy_by_position(subject.model, batches, positions)
    pictures.draw_positions(positions, found, own[0], len(images), path)
    by_place = dict(zip(positions, found, strict=True))
    return f"top-1 {by_place[own[0]]:.1f} % at its own place, {min(found):.1f} % at the worst of {len(positions)}"


PICTURES: dict[str, Callable[[Subject, Path], str]] = {
    "receptive-field": _receptive_field, "attention": _attention, "attribution": _attribution,
    "components": _components, "decay": _decay, "class-position": _class_position,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line; its exit status, see `exit_status`."""
    parser = argparse.ArgumentParser(
        prog="python -m vim.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*PICTURES, "all"], help="what to draw")
    parser.add_argument("image", type=Path, nargs="*", metavar="IMAGE")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of main.py, or another one with --model")
    parser.add_argument("--out", type=Path, default=Path("output/analysis"), help="folder of the pictures")
    parser.add_argument("--images", type=int, default=64, help="images of the test set, where many are averaged")
    parser.add_argument("--layer", type=int, help="block to look at, from 0; the last by default")
    for name, text in (
        ("--model", "name of the model, where the checkpoint does not say it"),
        ("--input-size", "side of the images in pixels; the position embedding is resampled"),
        ("--data-set", "as of main.py"), ("--data-path", "as of main.py"), ("--device", "cuda or cpu"),
    ):  # fmt: skip
        parser.add_argument(name, help=text)
    args = parser.parse_intermixed_args(argv)
    set_up_logging()
    return exit_status(lambda: _draw(args))


def _draw(args: argparse.Namespace) -> None:
    if args.images < 1:
        raise UserError(f"--images is {args.images}, expected at least 1")
    names = ("model", "input_size", "data_set", "data_path", "device")
    given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
    subject = Subject(open_model(args.checkpoint, flags), args.image, args.images, args.layer)
    for name in PICTURES if args.name == "all" else [args.name]:
        path = args.out / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            line = PICTURES[name](subject, path)
        except ImportError as error:
            raise UserError(f"{name} needs {error.name}: pip install 'vision-mamba[analysis]'") from error
        except ValueError as error:
            raise UserError(f"{name} cannot be drawn: {error}") from error
        print(f"{path}: {line}")


if __name__ == "__main__":
    sys.exit(main())
