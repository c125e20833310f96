"""Draw a trained model's prediction on an image."""

import argparse
import importlib
from pathlib import Path

import torch

from vim.dense.stack import require_stack
from vim.errors import UserError


def demo(task: str, argv: list[str] | None = None) -> Path:
    """Draw classes ("seg") or boxes and masks ("det") on an image, and return the file written.

    Args:
        task: "seg" or "det".
        argv: flags; those of the process by default.

    Raises:
        UserError: image, config or checkpoint cannot be read, or do not fit each other.
    """
    from vim.dense.cli import TASKS, check_weights, read_config

    parser = argparse.ArgumentParser(description="Draw a trained model's prediction on an image.")
    parser.add_argument("image", type=Path)
    parser.add_argument("config")
    parser.add_argument("checkpoint", help="checkpoint that train.py wrote with this config")
    parser.add_argument("--out", type=Path, default=Path("output") / f"demo_{task}.png", help="image to write")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a box that is drawn (0.5)")
    parser.add_argument("--opacity", type=float, default=0.5, help="of the classes' colours (0.5)")
    args = parser.parse_args(argv)
    require_stack(TASKS[task])
    import mmcv
    from mmengine.registry import VISUALIZERS
    from mmengine.utils import import_modules_from_strings

    pixels = mmcv.imread(str(args.image)) if args.image.is_file() else None
    if pixels is None:
        raise UserError(f"{args.image} is not an image that OpenCV can read: give a JPEG or PNG file")
    import_modules_from_strings("vim.dense.register")
    cfg = read_config(task, args.config)
    apis = importlib.import_module(f"{TASKS[task]}.apis")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    content = check_weights(cfg.model, args.checkpoint)
    init, infer = {
        "seg": ("init_model", "inference_model"),
        "det": ("init_detector", "inference_detector"),
    }[task]
    model = getattr(apis, init)(cfg, args.checkpoint, device=device)
    meta = content.get("meta", {}).get("dataset_meta")
    if meta:
        model.dataset_meta = meta
    sample = getattr(apis, infer)(model, pixels)
    visualizer = VISUALIZERS.build({**cfg.visualizer, "vis_backends": None, "save_dir": None})
    visualizer.dataset_meta = model.dataset_meta
    extra = {"with_labels": False} if task == "seg" else {"pred_score_thr": args.score}
    if task == "seg":
        visualizer.alpha = args.opacity
    args.out.parent.mkdir(parents=True, exist_ok=True)
    visualizer.add_datasample(
        "demo", pixels[..., ::-1], data_sample=sample, draw_gt=False, out_file=str(args.out), **extra
    )
    print(f"wrote {args.out}: {_summary(task, sample, model.dataset_meta['classes'], args.score)}")
    return args.out


def _summary(task: str, sample: object, classes: list[str], score: float) -> str:
    if task == "det":
        labels = sample.pred_instances.labels[sample.pred_instances.scores >= score].tolist()
        return (
            ", ".join(f"{labels.count(i)} {name}" for i, name in enumerate(classes) if i in labels) or "nothing found"
        )
    shares = torch.bincount(sample.pred_sem_seg.data.flatten().cpu(), minlength=len(classes)).float()
    shares = 100 * shares / shares.sum()
    order = [i for i in shares.argsort(descending=True).tolist() if shares[i] >= 0.5]
    return ", ".join(f"{classes[i]} {shares[i]:.0f} %" for i in order)
