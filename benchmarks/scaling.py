"""How training scales over processes: replicas (DDP) and shards (FSDP2), with synthetic input and with JPEGs.

    python benchmarks/scaling.py --model vim_tiny_patch16_224 --processes 1 2 --batch-size 128 --jpegs 20000
    python benchmarks/scaling.py --model vim_base_patch16_224 --processes 1 2 --batch-size 64 --modes ddp fsdp

Each case is a torchrun of the training engine's own epoch: an epoch to warm up, then a measured one. One GPU per
process through NCCL, or CPU processes through gloo with --device cpu. Prints a table and writes scaling.csv: images/s
over all processes, the efficiency (images/s per process over those of one process with the same input), the largest
memory of a process, and for JPEGs the share of the time that was spent waiting for data. --jpegs N writes an
ImageNet-shaped set of N images of 500 x 375 pixels once, below --out.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from rich.table import Table

from vim.data import build_datasets, build_loaders, seed_all
from vim.engine.arguments import parse_args
from vim.engine.build import build_criterion, build_model, build_training
from vim.engine.checkpoints import CheckpointManager
from vim.engine.distributed import choose_context, largest_over_ranks
from vim.engine.reporting import Reporter
from vim.engine.training import build_backward, train_one_epoch

MODES = ("ddp", "fsdp")
COLUMNS = (
    "model",
    "mode",
    "input",
    "processes",
    "batch_size",
    "images_per_s",
    "efficiency",
    "memory_mib",
    "wait_share",
)


class Synthetic:
    """The same batch on the device `steps` times, with the interface of a training loader."""

    def __init__(self, args: argparse.Namespace, classes: int, device: torch.device, steps: int) -> None:
        shape = (args.batch_size, args.in_chans, *args.image_size)
        self.batch = torch.randn(shape, device=device), torch.randint(classes, shape[:1], device=device)
        self.steps = steps

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""

    def set_start_step(self, step: int) -> None:
        """So are all batches."""

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter([self.batch] * self.steps)


class Cut:
    """The first `steps` batches of a training loader's epochs."""

    def __init__(self, loader: object, steps: int) -> None:
        self.loader, self.steps = loader, min(steps, len(loader))

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for k, batch in enumerate(self.loader, start=1):
            yield batch
            if k == self.steps:
                return


def make_jpegs(folder: Path, count: int, classes: int = 1000) -> int:
    """An ImageNet-shaped tree of `count` training images, kept if it is there; gives the number of classes."""
    classes = min(classes, count)
    if not (folder / "complete").is_file():

        def make(k: int) -> None:
            rng = np.random.default_rng(k)
            # Smooth, with some noise: about as large and as slow to decode as a photograph.
            image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
            pixels = np.asarray(image, dtype=np.int16) + rng.integers(-12, 12, (375, 500, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            for split in ("train", "val") if k < classes else ("train",):
                path = folder / split / f"n{k % classes:08d}" / f"{k}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, quality=85)

        with ThreadPoolExecutor() as pool:
            list(pool.map(make, range(count)))
        (folder / "complete").touch()
    return classes


def work(case: dict[str, object], flags: list[str]) -> None:
    """One process of a case; the first writes what was measured."""
    args = parse_args(flags)
    context = choose_context(args)
    seed_all(args.seed)
    if case["input"] == "synthetic":
        classes = 1000
        loader: object = Synthetic(args, classes, context.device, int(case["steps"]))
    else:
        train_set, eval_set, classes = build_datasets(args)
        loader, _ = build_loaders(args, train_set, eval_set, world_size=context.world_size, rank=context.rank)
        loader = Cut(loader, int(case["steps"]))
    model = build_model(args, classes).to(context.device)
    state = build_training(model, args, context)
    backward = build_backward(state, build_criterion(args, context, classes), args, context)
    reporter, manager = Reporter(None, args, enabled=False), CheckpointManager(None, args, context)
    for _ in range(2):
        record = train_one_epoch(state, loader, backward, args, context, reporter, manager)
        state.next_epoch()
    memory = largest_over_ranks(round(record["train_memory_mib"]), context)
    if context.is_main:
        measured = {
            "images_per_s": record["train_images_per_s"], "memory_mib": memory,
            "wait_share": record["train_data_wait_s"] / record["train_s"],
        }  # fmt: skip
        Path(str(case["result"])).write_text(json.dumps(measured))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(case: dict[str, object], flags: list[str]) -> dict[str, float]:
    """Run a case by torchrun; gives what its first process measured."""
    with tempfile.TemporaryDirectory() as folder:
        case = {**case, "result": str(Path(folder) / "result.json")}
        command = [sys.executable, __file__]
        if case["processes"] != 1:
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case['processes']}",
                __file__,
            ]  # fmt: skip
        done = subprocess.run([*command, "--worker", json.dumps(case), *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {case} failed:\n{done.stderr[-2000:]}")
        return json.loads(Path(str(case["result"])).read_text())


def build_parser() -> argparse.ArgumentParser:
    """Flags of the benchmark; those it does not know go to the training engine."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="other flags, such as --amp-dtype bfloat16, are main.py's",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model", default="vim_tiny_patch16_224", help="model")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, max(1, torch.cuda.device_count())], help="counts"
    )
    parser.add_argument("--modes", nargs="+", default=["ddp"], choices=MODES, help="ddp: replicas; fsdp: shards")
    parser.add_argument("--batch-size", type=int, default=128, help="images per process and step")
    parser.add_argument("--steps", type=int, default=30, help="steps of the measured epoch")
    parser.add_argument(
        "--jpegs", type=int, default=0, help="also measure with so many JPEGs; 0: synthetic input alone"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("output/benchmarks"), help="folder of scaling.csv and the JPEGs"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure every case, print the table, write the CSV."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        work(json.loads(argv[1]), argv[2:])
        return 0
    args, further = build_parser().parse_known_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    flags = ["--model", args.model, "--batch-size", str(args.batch_size), "--epochs", "3", "--warmup-epochs", "0",
             "--no-repeated-aug", "--no-model-ema", "--trackers", "none", *further]  # fmt: skip
    inputs = {"synthetic": []}
    if args.jpegs:
        root = (args.out / f"jpegs-{args.jpegs}").resolve()
        make_jpegs(root, args.jpegs)
        inputs["jpeg"] = ["--data-path", str(root)]
    rows, single = [], {}
    for source, data in inputs.items():
        for processes in sorted(set(args.processes)):
            for mode in args.modes:
                if mode == "fsdp" and processes == 1:
                    continue  # nothing to shard
                case = {"mode": mode, "input": source, "processes": processes, "steps": args.steps}
                sharding = ["--fsdp"] if mode == "fsdp" else []
                found = measure(case, [*flags, *data, *sharding])
                each = found["images_per_s"] / processes
                if processes == 1:
                    single[source] = each
                efficiency = each / single[source] if source in single else float("nan")
                rows.append(
                    {"model": args.model, "batch_size": args.batch_size, "efficiency": efficiency, **case, **found}
                )
    with (args.out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS))
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
