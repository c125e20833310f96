"""Classify images: `python -m vim.analysis.predict --checkpoint FILE IMAGE...`.

Prints the five most likely classes of each image, and draws them beside it.
"""

import argparse
import sys
from pathlib import Path

import torch

from vim.analysis.opening import open_model
from vim.analysis.plots import plot_classes
from vim.data.images import decode
from vim.engine.run import set_up_logging
from vim.engine.training import autocast
from vim.errors import UserError, exit_status

TOP = 5


@torch.no_grad()
def predict(checkpoint: Path, images: list[Path], argv: list[str]) -> list[list[tuple[str, float]]]:
    """The most likely classes of images, each as pairs (name, probability), the most likely first.

    Args:
        checkpoint: a file of `main.py`, or another program's with `--model` in `argv`.
        images: files.
        argv: flags of `main.py` beside `--eval` and `--resume`.

    Raises:
        UserError: a file that cannot be read, or weights of another model.
    """
    opened = open_model(checkpoint, argv)
    args, model = opened.args, opened.model
    results = []
    for path in images:
        picture = opened.read(path)
        with autocast(args, opened.context):
            logits = model(picture[None])
        values, classes = logits.float().softmax(1)[0].topk(min(TOP, len(opened.classes)))
        if not values.isfinite().all():
            raise UserError(f"the model's outputs for {path} are not finite, so its weights are of no use")
        results.append([(opened.classes[k], p) for k, p in zip(classes.tolist(), values.tolist(), strict=True)])
    return results


def main(argv: list[str] | None = None) -> int:
    """Command line; its exit status, see `exit_status`."""
    parser = argparse.ArgumentParser(prog="python -m vim.analysis.predict", description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of main.py, or another one with --model")
    parser.add_argument("--out", type=Path, default=Path("predictions.png"), help="image to write")
    parser.add_argument("--model", help="name of the model, where the checkpoint does not say it")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--max-image-pixels", help="images of more pixels are refused")
    args = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: _say_and_draw(args))


def _say_and_draw(args: argparse.Namespace) -> None:
    given = {"--model": args.model, "--device": args.device, "--max-image-pixels": args.max_image_pixels}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
    results = predict(args.checkpoint, args.images, flags)
    for path, classes in zip(args.images, results, strict=True):
        print(path)
        for name, probability in classes:
            print(f"  {probability:6.1%}  {name}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plot_classes([decode(path, "RGB") for path in args.images], results, args.out)
    except (OSError, ValueError) as error:  # ValueError: of a name whose ending is no format
        raise UserError(f"--out {args.out} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    print(f"drawn in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
