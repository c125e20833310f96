"""Accuracy against speed of a trained classifier as more of its tokens are merged at inference.

python scripts/plot_merging.py output/quickstart/checkpoint.pth --picture assets/merging.png

Prints a Markdown table and draws it. The checkpoint is one of main.py's; its evaluation set is read again. Speeds are
of forward passes alone, medians over rounds in which every ratio takes its turn.
"""

import argparse
import sys
import time
from pathlib import Path

import timm
import torch

import vim  # noqa: F401  registers the models
from vim.data import build_datasets
from vim.engine.arguments import parse_args
from vim.models import extract_state_dict, load_checkpoint, load_into

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@torch.inference_mode()
def measure(
    models: dict[float, torch.nn.Module], images: torch.Tensor, targets: torch.Tensor, rounds: int
) -> list[dict]:
    """Top-1 in percent, tokens at the end and images per second of each ratio."""
    rows, times = [], {ratio: [] for ratio in models}
    batches = list(zip(images.split(250), targets.split(250), strict=True))
    for ratio, model in models.items():
        hits = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
        rows.append(
            {"ratio": ratio, "top1": 100 * hits / len(images), "tokens": model.forward_features(images[:1]).shape[1]}
        )
    for _ in range(rounds):
        for ratio, model in models.items():
            tick = time.perf_counter()
            model(batches[0][0])
            if images.is_cuda:
                torch.cuda.synchronize()
            times[ratio].append(time.perf_counter() - tick)
    for row in rows:
        row["rate"] = len(batches[0][0]) / sorted(times[row["ratio"]])[rounds // 2]
    return rows


def draw(rows: list[dict], picture: Path) -> None:
    """Accuracy over relative speed, each point with its ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    speed = [row["rate"] / rows[0]["rate"] for row in rows]
    axes.plot(speed, [row["top1"] for row in rows], "o-")
    for x, row in zip(speed, rows, strict=True):
        axes.annotate(f"{row['ratio']:.1f}", (x, row["top1"]), textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="speed relative to no merging", ylabel="top-1 (%)")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of a model with a class token, written by main.py")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each ratio")
    parser.add_argument("--picture", type=Path, default=None, help="where to draw the curve")
    args = parser.parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    flags = parse_args(["--eval", "--resume", str(args.checkpoint)], {**checkpoint["args"], "config": None})
    _, data, num_classes = build_datasets(flags)
    images, targets = zip(*(data[i] for i in range(len(data))), strict=True)
    models = {}
    for ratio in RATIOS:
        models[ratio] = timm.create_model(
            flags.model, num_classes=num_classes, img_size=flags.input_size, in_chans=flags.in_chans, merge_ratio=ratio,
            **flags.model_kwargs,
        ).eval()  # fmt: skip
        load_into(models[ratio], extract_state_dict(checkpoint), grid=checkpoint.get("grid"))
        models[ratio].to(args.device)
    rows = measure(models, torch.stack(images).to(args.device), torch.tensor(targets, device=args.device), args.rounds)
    print("| merged after each of two blocks | tokens at the end | top-1 (%) | images/s | speed |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        speed = row["rate"] / rows[0]["rate"]
        print(f"| {row['ratio']:.1f} | {row['tokens']} | {row['top1']:.2f} | {row['rate']:,.0f} | {speed:.2f} |")
    if args.picture:
        draw(rows, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
