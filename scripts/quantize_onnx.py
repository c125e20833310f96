"""Write the model of a run as ONNX with int8 projections, and say what that costs on the evaluation split.

python scripts/quantize_onnx.py output/quickstart/checkpoint.pth --output vim_int8.onnx --images 256
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vim  # noqa: F401  registers the models
from vim.data.datasets import build_dataset
from vim.engine import checkpoints
from vim.engine.build import build_model
from vim.engine.inherited import continue_flags, head_size, load_weights
from vim.errors import USER_ERRORS, UserError

BATCH = 50


def batches(data: Any, indices: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (batch, C, H, W) and class numbers (batch,) of samples of a data set."""
    for start in range(0, len(indices), BATCH):
        pairs = [data[i] for i in indices[start : start + BATCH]]
        yield torch.stack([image for image, _ in pairs]).numpy(), np.array([int(target) for _, target in pairs])


def measure(model: Path, data: Any, threads: int) -> tuple[float, float]:
    """Top-1 accuracy on a data set in percent, and milliseconds per image in batches of 50."""
    from vim.models.quantize import session

    run = session(model, threads)
    right, seconds = 0, 0.0
    for images, targets in batches(data, range(len(data))):
        start = time.perf_counter()
        (logits,) = run.run(None, {"images": images})
        seconds += time.perf_counter() - start
        right += int((logits.argmax(-1) == targets).sum())
    return 100 * right / len(data), 1e3 * seconds / len(data)


def run(argv: list[str] | None = None) -> None:
    """Parse, export, calibrate on training images, quantize and evaluate.

    Raises:
        UserError: a checkpoint that is not of `main.py`, missing data, a missing package or folder.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of main.py; its flags say which data set")
    parser.add_argument("--output", type=Path, default=Path("model_int8.onnx"), help="file to write")
    parser.add_argument("--images", type=int, default=256, help="training images to calibrate with")
    parser.add_argument("--data-path", help="folder of the data set, if it has moved")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of ONNX Runtime")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise UserError(f"--images is {args.images}: at least one image is needed to calibrate")
    if not args.output.parent.is_dir():
        raise UserError(f"there is no folder {args.output.parent} to write {args.output.name} into: create it first")
    try:
        from vim.models.export import export_onnx
        from vim.models.quantize import quantize_onnx
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'vision-mamba[export]'") from error
    content = checkpoints.read(args.checkpoint, "")
    if not checkpoints.is_own(content):
        raise UserError(f"{args.checkpoint} is no checkpoint of main.py: it does not say what data to calibrate with")
    place = [] if args.data_path is None else ["--data-path", args.data_path]
    flags = continue_flags(content, ["--eval", "--resume", args.checkpoint, "--device", "cpu", *place])
    model = build_model(flags, head_size(flags, content))
    load_weights(model, content)
    train, evaluation = build_dataset(True, flags)[0], build_dataset(False, flags)[0]
    # Spread over the split, which may be in the order of its classes.
    chosen = range(0, len(train), max(1, len(train) // args.images))[: args.images]
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "model.onnx"
        export_onnx(model.float().eval(), exact, native=True)
        quantize_onnx(exact, args.output, (images for images, _ in batches(train, chosen)))
        for name, file in (("float32", exact), ("int8", args.output)):
            top1, milliseconds = measure(file, evaluation, args.threads)
            size = file.stat().st_size / 1e6
            print(f"{name}: top-1 {top1:.2f} % of {len(evaluation)}, {milliseconds:.2f} ms an image, {size:.2f} MB")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what is wrong."""
    try:
        run(argv)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
