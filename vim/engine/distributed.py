"""Processes and devices: torchrun's environment, or one process; replicas and shards."""

import logging
import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vim.errors import UserError
from vim.flags import Run

_logger = logging.getLogger("vision_mamba")


@dataclass(frozen=True)
class DistributedContext:
    """Where this process runs: its device and its rank among `world_size`."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def choose_context(args: Run) -> DistributedContext:
    """Device of `--device`, or the CPU where it is not there (said in one line), and torchrun's ranks.

    Raises:
        UserError: unknown device, or several processes asked for without their environment.
    """
    name = args.device
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device is {name!r}, expected cuda or cpu")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ and (args.distributed or args.world_size > 1):
        raise UserError("several processes need a launcher: start with torchrun --nproc-per-node=N main.py ...")
    if args.world_size not in (1, world_size):
        raise UserError(f"--world_size is {args.world_size} and the launcher started {world_size}: leave the flag out")
    if name == "cuda" and not torch.cuda.is_available():
        if rank == 0:
            _logger.warning("no CUDA device is there: running on the CPU with %d threads", torch.get_num_threads())
        name = "cpu"
    if args.fsdp and world_size == 1:
        raise UserError("--fsdp shards the model over processes: start with torchrun --nproc-per-node=N main.py ...")
    if world_size == 1:
        return DistributedContext(torch.device(name))
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", args.local_rank)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if name == "cuda" else "gloo", init_method=args.dist_url, rank=rank, world_size=world_size
        )
    return DistributedContext(device, rank, world_size)


def sum_over_ranks(values: torch.Tensor, context: DistributedContext) -> torch.Tensor:
    """Sum of a tensor over all processes, in place where it lies on this process's device."""
    if context.world_size > 1:
        values = values.to(context.device)
        dist.all_reduce(values)
    return values


def count_bad_images(data: Any, context: DistributedContext) -> int:
    """Images of a data set that proved bad so far, each once however many processes met it."""
    marks = data.bad_images().to(context.device)
    if context.world_size > 1:
        # Streams have a plain count instead, of samples that one process alone reads.
        dist.all_reduce(marks, dist.ReduceOp.MAX if marks.dtype == torch.uint8 else dist.ReduceOp.SUM)
    return int(marks.sum())


def largest_over_ranks(value: int, context: DistributedContext) -> int:
    """Largest of the processes' integers."""
    if context.world_size == 1:
        return value
    tensor = torch.tensor(value, device=context.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def shard(model: nn.Module) -> None:
    """Shard a model over all processes in place (FSDP2): each block by itself, then the rest.

    Raises:
        UserError: its blocks cannot be told.
    """
    blocks = getattr(model, "layers", None) or getattr(model, "blocks", None)
    if blocks is None:
        raise UserError(f"--fsdp shards block by block, and {type(model).__name__} has neither `layers` nor `blocks`")
    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def replicate(model: nn.Module, context: DistributedContext) -> nn.Module:
    """The model behind DistributedDataParallel, or itself in a single process."""
    if context.world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[context.device] if context.device.type == "cuda" else None)


def without_gradient_exchange(forward: nn.Module) -> AbstractContextManager:
    """Inside, backward passes only add to this process's gradients: for all but the last of an accumulated update."""
    forward = getattr(forward, "_orig_mod", forward)
    if isinstance(forward, DistributedDataParallel):
        return forward.no_sync()
    if isinstance(forward, FSDPModule):
        return _keep_unreduced(forward)
    return nullcontext()


@contextmanager
def _keep_unreduced(model: FSDPModule):
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
