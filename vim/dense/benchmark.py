"""Parameters, FLOPs and speed of a config's model on random images."""

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from vim.dense.stack import require_stack
from vim.errors import UserError


def benchmark(task: str, argv: list[str] | None = None) -> dict[str, float]:
    """Print and give parameters (M), FLOPs (G) of one image, and images per second.

    Args:
        task: "seg" or "det".
        argv: flags; those of the process by default.

    Raises:
        UserError: a config that cannot be read, or a shape that is none.
    """
    from vim.dense.cli import TASKS, read_config

    parser = argparse.ArgumentParser(description="Parameters, FLOPs and images per second of a config's model.")
    parser.add_argument("config")
    parser.add_argument("--shape", type=int, nargs="+", default=[512], help="side, or height and width (512)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10, help="timed calls after two that are not (10)")
    parser.add_argument("--backbone", action="store_true", help="the backbone alone")
    args = parser.parse_args(argv)
    if len(args.shape) > 2 or min(args.shape) < 32 or min(args.batch_size, args.rounds) < 1:
        raise UserError("expected --shape SIDE or --shape HEIGHT WIDTH of 32 or more, and positive counts")
    height, width = args.shape[0], args.shape[-1]
    require_stack(TASKS[task])
    from mmengine.registry import MODELS
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings("vim.dense.register")
    cfg = read_config(task, args.config)
    model = MODELS.build(cfg.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    if args.backbone:
        model = model.backbone
    images = torch.zeros(args.batch_size, 3, height, width, device=device)
    samples = None if args.backbone else _samples(task, args.batch_size, height, width)

    @torch.no_grad()
    def run() -> None:
        model(images) if args.backbone else model(images, samples, mode="predict")
        if device.type == "cuda":
            torch.cuda.synchronize()

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    with FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_total_flops() / args.batch_size / 1e9
    run()
    start = time.perf_counter()
    for _ in range(args.rounds):
        run()
    speed = args.batch_size * args.rounds / (time.perf_counter() - start)
    print(
        f"{args.config} at {height} × {width}, batch {args.batch_size}, {device.type}: {parameters:.2f} M parameters, "
        f"{flops:.3f} GFLOPs per image, {speed:.2f} images/s"
    )
    return {"parameters": parameters, "flops": flops, "images_per_second": speed}


def _samples(task: str, count: int, height: int, width: int) -> list:
    shape = (height, width)
    meta = {"ori_shape": shape, "img_shape": shape, "pad_shape": shape, "batch_input_shape": shape}
    if task == "seg":
        from mmseg.structures import SegDataSample

        return [SegDataSample(metainfo={**meta, "padding_size": [0] * 4}) for _ in range(count)]
    from mmdet.structures import DetDataSample

    return [DetDataSample(metainfo={**meta, "scale_factor": (1.0, 1.0)}) for _ in range(count)]
