"""Processes and devices: torchrun's environment, or one process; replicas and shards."""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vim.environment import number
from vim.errors import UserError
from vim.flags import Run

_logger = logging.getLogger("vision_mamba")

_MOST_PROCESSES = 10**6
# Seconds in which the processes of a run must find each other.
MEETING_S = 300


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
    world_size = number("WORLD_SIZE", 1, 1, _MOST_PROCESSES)
    rank = number("RANK", 0, 0, world_size - 1)
    local_rank = number("LOCAL_RANK", args.local_rank, 0, _MOST_PROCESSES)
    number("LOCAL_WORLD_SIZE", 1, 1, _MOST_PROCESSES)
    if "RANK" not in os.environ and (args.distributed or args.world_size > 1 or world_size > 1):
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
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(f"process {local_rank} of this node has no GPU, there are {gpus}: start as many processes")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _meet("nccl" if name == "cuda" else "gloo", args.dist_url, rank, world_size)
    return DistributedContext(device, rank, world_size)


def _meet(backend: str, url: str, rank: int, world_size: int) -> None:
    """Join the process group; the wait for the others is bounded.

    Raises:
        UserError: the place to meet is not given, taken by another program, or cannot be reached.
    """
    if url == "env://":
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise UserError(f"{missing[0]} is not set, where {world_size} processes meet: start them with torchrun")
        number("MASTER_PORT", 0, 1, 65535)
        place = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
    else:
        place = f"--dist_url {url}"
    try:
        store, rank, world_size = next(dist.rendezvous(url, rank, world_size, timeout=timedelta(seconds=MEETING_S)))
        # All are there. From now on one may be busy for longer, for instance reading the data set.
        store.set_timeout(dist.constants.default_pg_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    # ValueError, RuntimeError: of the address; the others are subclasses of the latter.
    except (ValueError, RuntimeError, OSError) as error:
        text = str(error)
        reason = "another program has the port" if "EADDRINUSE" in text else text.strip().splitlines()[0][:200]
        raise UserError(
            f"the {world_size} processes do not meet at {place} ({reason}): check the address, choose a free port, and "
            f"start all of them within {MEETING_S} s"
        ) from error


def in_main_process(action: Callable[[], None], context: DistributedContext) -> None:
    """Let the main process do something; where it fails, all processes raise.

    Raises:
        UserError: of the action.
    """
    failed: list[UserError | None] = [None]
    if context.is_main:
        try:
            action()
        except UserError as error:
            if context.world_size == 1:
                raise
            failed[0] = error
    if context.world_size > 1:
        said = [None if failed[0] is None else str(failed[0])]
        dist.broadcast_object_list(said)
        if said[0] is not None:
            raise UserError(said[0]) from failed[0]


def sum_over_ranks(values: torch.Tensor, context: DistributedContext) -> torch.Tensor:
    """Sum of a tensor over all processes, in place where it lies on this process's device."""
    if context.world_size > 1:
        values = values.to(context.device)
        dist.all_reduce(values)
    return values


def count_bad_images(data: Any, context: DistributedContext) -> int:
    """Number of unreadable images of a data set so far; one that several processes met counts once."""
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
        UserError: its blocks cannot be identified.
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
    """Context for all but the last batch of an update: gradients are accumulated without being exchanged."""
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
