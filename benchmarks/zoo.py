"""Speed and cost of the models in docs/zoo.md as a Markdown table: python benchmarks/zoo.py [--device cuda] [NAME ...].

Parameters, tokens, operations of a forward pass with the scan's, and images (clips) per second. On a GPU the pass is
replayed from a CUDA graph.
"""

import argparse
import sys
import time

import timm
import torch

import vim  # noqa: F401  registers the models
from vim.analysis.flops import count_flops

NAMES = (
    "vim_tiny_patch16_224", "mambar_tiny_patch16_224", "fastvim_tiny_patch16_224", "videomamba_tiny_patch16_224",
    "videomamba_tiny_patch16_f8_224", "vim_small_patch16_224", "mambar_small_patch16_224", "fastvim_small_patch16_224",
    "videomamba_small_patch16_224", "vim_base_patch16_224", "mambar_base_patch16_224", "fastvim_base_patch16_224",
    "vim_base_layernorm_patch16_224", "videomamba_base_patch16_224", "arm_base_patch16_224",
)  # fmt: skip


@torch.inference_mode()
def images_per_second(model: torch.nn.Module, images: torch.Tensor, seconds: float) -> float:
    """The median over runs of at least `seconds` in all."""
    if images.is_cuda:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(images)
        forward, wait = graph.replay, torch.cuda.synchronize
    else:
        forward, wait = (lambda: model(images)), (lambda: None)
        forward()
    forward()
    wait()
    times, begun = [], time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < 3:
        tick = time.perf_counter()
        forward()
        wait()
        times.append(time.perf_counter() - tick)
    return len(images) / sorted(times)[len(times) // 2]


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help="registered models")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument("--batch-size", type=int, default=0, help="images; 64 on a GPU, 1 on a CPU by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring for each model")
    args = parser.parse_args(argv)
    batch = args.batch_size or (64 if args.device == "cuda" else 1)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(f"| model | parameters (M) | tokens | GFLOP | {args.device}, batch {batch}, {dtype} (images/s) |")
    print("| --- | --- | --- | --- | --- |")
    for name in args.names:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        flops, count = count_flops(model), sum(p.numel() for p in model.parameters())
        layout = model.token_layout
        tokens = layout.frames * layout.grid[0] * layout.grid[1] + len(layout.positions)
        model = timm.create_model(name).eval().to(args.device, dtype)
        images = torch.randn(batch, *model.input_shape, device=args.device, dtype=dtype)
        rate = images_per_second(model, images, args.seconds)
        print(f"| `{name}` | {count / 1e6:.1f} | {tokens} | {flops / 1e9:.2f} | {rate:,.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
