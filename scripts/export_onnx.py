"""Write a model as ONNX, check it in ONNX Runtime and time it.

python scripts/export_onnx.py vim_tiny_patch16_224 --checkpoint vim_t.pth --img-size 224 448 --output vim_t.onnx
"""

import argparse
import os
import sys
import time
from pathlib import Path

import timm
import torch
from mamba_ssm_vim.onnxruntime import library_path

import vim  # noqa: F401  registers the models
from vim.environment import check_kernels
from vim.errors import UserError, exit_status
from vim.models import CheckpointError, VisionMamba, extract_state_dict, load_checkpoint, load_into
from vim.models.registry import check_tag

# Float32 logits of order 1 to 10, the operators of both runtimes summing in different orders.
TOLERANCE = 1e-4


def build(args: argparse.Namespace) -> VisionMamba:
    """The model with its weights, on the image size asked for.

    Raises:
        UserError: an unknown name, a size that does not fit, or a checkpoint that cannot be used.
    """
    if not timm.is_model(args.model.split(".")[0]) or not args.model.startswith("vim_"):
        known = ", ".join(n for n in timm.list_models("vim_*") if "bimamba" not in n)
        raise UserError(f"there is no model {args.model}: choose one of {known}")
    try:
        check_tag(args.model)
    except ValueError as error:
        raise UserError(str(error)) from error
    arguments = {} if args.img_size is None else {"img_size": (args.img_size * 2)[:2]}
    try:
        state = None
        if args.checkpoint is not None:
            state = extract_state_dict(load_checkpoint(args.checkpoint), use_ema=args.use_ema)
            if "head.weight" in state:
                arguments["num_classes"] = len(state["head.weight"])
        model = timm.create_model(args.model, **arguments).eval()
        if state is not None:
            load_into(model, state, reset_head=False)
    except (CheckpointError, ValueError) as error:
        raise UserError(str(error)) from error
    return model


def check(model: VisionMamba, file: Path, threads: int, native: bool = False) -> tuple[float, float]:
    """Largest difference from PyTorch over batches of 1 and 3 images, and seconds per single image."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if native:
        options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    difference, seconds = 0.0, float("inf")
    for batch in (3, 1, 1, 1):
        images = torch.randn(batch, model.in_chans, *model.patch_embed.img_size, generator=generator)
        start = time.perf_counter()
        (logits,) = session.run(None, {"images": images.numpy()})
        if batch == 1:
            seconds = min(seconds, time.perf_counter() - start)
        with torch.no_grad():
            difference = max(difference, (torch.from_numpy(logits) - model(images)).abs().max().item())
    return difference, seconds


def run(argv: list[str] | None = None) -> None:
    """Parse, build, export and check.

    Raises:
        UserError: as `build`, a missing package or folder, or an exported model that computes something else.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="registered name, such as vim_tiny_patch16_224")
    parser.add_argument(
        "--checkpoint", help=".pth, .safetensors or hf-hub:owner/repository/file; random weights if left out"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the checkpoint's EMA weights")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
    parser.add_argument("--output", type=Path, default=Path("model.onnx"), help="file to write")
    parser.add_argument(
        "--native", action="store_true",
        help="mixers as an operator of the domain vision_mamba, which ONNX Runtime runs with this project's CPU "
        "library, instead of standard operators only",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of ONNX Runtime in the check")
    args = parser.parse_args(argv)
    if args.img_size is not None and len(args.img_size) > 2:
        raise UserError(f"--img-size takes a side, or height and width, got {len(args.img_size)} numbers")
    if not args.output.parent.is_dir():
        raise UserError(f"there is no folder {args.output.parent} to write {args.output.name} into: create it first")
    check_kernels("cpu")
    model = build(args)
    try:
        import onnxruntime  # noqa: F401

        from vim.models.export import export_onnx
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'vision-mamba[export]'") from error
    if args.native:
        try:
            library_path()
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    export_onnx(model, args.output, native=args.native)
    difference, seconds = check(model, args.output, args.threads, args.native)
    if not difference <= TOLERANCE:
        raise UserError(f"{args.output} differs from PyTorch by {difference:.1e}, more than {TOLERANCE}: do not use it")
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, within {difference:.1e} of PyTorch, "
        f"{seconds * 1e3:.0f} ms an image with {args.threads} threads"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status, see `exit_status`."""
    return exit_status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
