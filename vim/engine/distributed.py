"""Processes and devices: torchrun's environment, or one process."""

import argparse
import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vim.errors import UserError

_logger = logging.getLogger("vision_mamba")


@dataclass(frozen=True)
class Place:
    """Where this process runs: its device and its rank among `world_size`."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def choose_place(args: argparse.Namespace) -> Place:
    """Device of `--device`, or the CPU where it is not there (said in one line), and torchrun's ranks.

    Raises:
        UserError: unknown device.
    """
    name = args.device
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device is {name!r}, expected cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        if int(os.environ.get("RANK", 0)) == 0:
            _logger.warning("no CUDA device is there: running on the CPU with %d threads", torch.get_num_threads())
        name = "cpu"
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Place(torch.device(name))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if name == "cuda" else "gloo", init_method="env://")
    return Place(device, rank, world_size)


def sum_over_ranks(values: torch.Tensor, place: Place) -> torch.Tensor:
    """Sum of a float64 vector over all processes."""
    if place.world_size > 1:
        values = values.to(place.device)
        dist.all_reduce(values)
    return values
