"""Pictures and figures of a finished run: `python -m vim.analysis.report OUTPUT_DIR`.

Evaluates the run's last checkpoint on its test set and leaves curves.png, predictions.png and confusion.png beside it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from vim.analysis.plots import plot_confusion, plot_curves, plot_predictions, read_log
from vim.data import build_datasets, build_loaders
from vim.data.transforms import normalisation
from vim.engine import checkpoints
from vim.engine.build import build_model
from vim.engine.distributed import choose_context
from vim.engine.evaluation import evaluate
from vim.engine.inherited import class_names, continue_flags, load_weights, match_classes
from vim.engine.reporting import Reporter
from vim.environment import check_kernels
from vim.errors import UserError, exit_status

PANEL = 32


def report(output_dir: Path, argv: list[str]) -> list[tuple[str, Path]]:
    """Write the pictures of the run in `output_dir`; gives what each path is.

    Args:
        output_dir: folder of the run.
        argv: flags of `main.py` that differ from the run's.

    Raises:
        UserError: the folder holds no finished epoch of a run.
    """
    path = output_dir / "checkpoint.pth"
    checkpoint = checkpoints.read(str(path), "")
    if not checkpoints.is_own(checkpoint):
        raise UserError(f"{path} was not written by this project's training")
    args = continue_flags(checkpoint, ["--eval", "--resume", str(path), *argv])
    context = choose_context(args)
    check_kernels(context.device.type)
    _, eval_set, num_classes = build_datasets(args)
    columns = match_classes(checkpoint, eval_set, training=False)
    model = build_model(args, num_classes if columns is None else len(class_names(checkpoint)))
    load_weights(model, checkpoint)
    model.to(context.device)
    _, loader = build_loaders(args, None, eval_set, world_size=1, rank=0)
    probabilities, targets = [], []

    def keep(logits: torch.Tensor, labels: torch.Tensor) -> None:
        probabilities.append(logits.softmax(1).cpu())
        targets.append(labels.cpu())

    evaluate(model, loader, args, context, Reporter(None, args, enabled=False), keep, columns=columns)
    confidence, predicted = torch.cat(probabilities).max(1)
    target = torch.cat(targets)
    classes = getattr(eval_set, "classes", [str(k) for k in range(num_classes)])

    # Evenly spaced over the set, so that every class shows when the set is ordered by class.
    chosen = np.linspace(0, len(eval_set) - 1, min(PANEL, len(eval_set))).astype(int)
    mean, std = (np.asarray(v).reshape(-1, 1, 1) for v in normalisation(args.in_chans))
    images = np.stack([(eval_set[i][0].numpy() * std + mean).clip(0, 1).transpose(1, 2, 0) for i in chosen])
    plot_curves({output_dir.name: read_log(output_dir / "log.txt")}, output_dir / "curves.png")
    plot_predictions(
        images, target[chosen].tolist(), predicted[chosen].tolist(), confidence[chosen].tolist(), classes,
        output_dir / "predictions.png",
    )  # fmt: skip
    plot_confusion(target.numpy(), predicted.numpy(), classes, output_dir / "confusion.png")
    return [
        ("checkpoint", path),
        ("learning curves", output_dir / "curves.png"),
        ("predictions", output_dir / "predictions.png"),
        ("confusion matrix", output_dir / "confusion.png"),
        ("log", output_dir / "log.txt"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line; its exit status, see `exit_status`."""
    parser = argparse.ArgumentParser(prog="python -m vim.analysis.report", description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="folder of a run; flags of main.py may follow")
    known, flags = parser.parse_known_args(argv)
    return exit_status(lambda: _say(known.output_dir, flags))


def _say(output_dir: Path, flags: list[str]) -> None:
    written = report(output_dir, flags)
    log = read_log(output_dir / "log.txt")
    best, last = max(record["test_acc1"] for record in log), log[-1]
    print(f"\ntop-1 {last['test_acc1']:.2f} % on the test images after {last['epoch'] + 1} epochs (best {best:.2f} %)")
    for what, path in written:
        print(f"  {what:<18} {path}")


if __name__ == "__main__":
    sys.exit(main())
