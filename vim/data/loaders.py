"""Loaders whose samples depend on (seed, epoch, position) only.

A run that is stopped and resumed sees the same batches, with any number of workers: the sampler yields
(epoch, position, index), and the random numbers of a sample's augmentation are seeded from them.
"""

import ctypes
import itertools
import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from vim.data.images import Samples, limit_pixels
from vim.data.seeding import seed_sample
from vim.data.streams import Stream, StreamLoader
from vim.errors import UserError
from vim.flags import Data

_logger = logging.getLogger("vision_mamba")

# Seconds that a worker goes on after SIGTERM, for the step that its parent is in.
_GRACE_S = 30


class SeededDataset(Dataset):
    """A data set indexed by (epoch, position, index); the first two seed the augmentation's random numbers."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        epoch, position, index = key
        seed_sample(self.seed, epoch, position)
        return self.dataset[index]


class EpochSampler(Sampler):
    """Keys (epoch, position, index) of one rank's share of an epoch, from a given sample on.

    Args:
        dataset: the training set.
        repeated: DeiT's repeated augmentation: three differently augmented copies of a third of the samples.
        seed, rank, world_size: of the run.
    """

    def __init__(self, dataset: Dataset, *, repeated: bool, seed: int, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.seed = rank, world_size, seed
        if repeated:
            # timm rounds the number of samples down to a multiple of 256, which would leave a small set empty.
            self.base = RepeatAugSampler(
                dataset, world_size, rank, selected_round=256 if len(dataset) >= 256 * world_size else 0
            )
        else:
            self.base = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.base) - self.start

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        # timm's sampler seeds itself by the epoch alone.
        self.base.set_epoch(self.epoch + (self.seed * 100_003 if isinstance(self.base, RepeatAugSampler) else 0))
        for k, index in enumerate(self.base):
            if k >= self.start:
                yield self.epoch, k * self.world_size + self.rank, int(index)


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _loader_options(args: Data) -> dict[str, Any]:
    """Number of workers, at most one per core, and pinning."""
    return {
        "num_workers": min(args.num_workers, _cores()),
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "worker_init_fn": partial(_start_worker, args.max_image_pixels),
    }


def _start_worker(max_image_pixels: int, worker: int) -> None:
    """Bound images in a worker as in its parent, and let the worker die with the parent, even by SIGKILL.

    Ctrl-C, which a terminal sends to all of them, is for the parent: it may need further batches to stop at. So is
    SIGTERM, which schedulers send to whole groups, and with which a parent ends a worker that hangs: it has its effect
    after a while.
    """
    limit_pixels(max_image_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # of linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


class TrainLoader:
    """Batches (images, targets) of one rank.

    `set_epoch` chooses the epoch, `set_start_step` skips the first batches of the next iteration without loading them.
    """

    def __init__(self, dataset: Dataset, args: Data, *, world_size: int, rank: int) -> None:
        self.dataset, self.batch_size = dataset, args.batch_size
        self.sampler = EpochSampler(
            dataset, repeated=args.repeated_aug, seed=args.seed, rank=rank, world_size=world_size
        )
        self.steps_per_epoch = len(self.sampler) // args.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"the training set gives {len(self.sampler)} samples per process, fewer than one batch: "
                f"--batch-size must be at most that, it is {args.batch_size}"
            )
        self.loader = DataLoader(
            SeededDataset(dataset, args.seed), batch_size=args.batch_size, sampler=self.sampler, drop_last=True,
            **_loader_options(args),
        )  # fmt: skip

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; it starts at its first batch."""
        self.sampler.epoch, self.sampler.start = epoch, 0

    def set_start_step(self, step: int) -> None:
        """Start the next iteration at this batch."""
        self.sampler.start = step * self.batch_size

    def batch_indices(self, step: int) -> list[int]:
        """Data-set indices of a batch of the chosen epoch, in its order."""
        start, self.sampler.start = self.sampler.start, step * self.batch_size
        try:
            return [index for _, _, index in itertools.islice(self.sampler, self.batch_size)]
        finally:
            self.sampler.start = start

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.loader)


class _ShardSampler(Sampler):
    """Every sample exactly once over all ranks, in order: rank, rank + world_size, ... without padding."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _stream_loader(stream: Stream, args: Data, batch_size: int, rank: int, world_size: int) -> StreamLoader:
    options = _loader_options(args)
    stream.share(rank, world_size, max(1, options["num_workers"]))
    return StreamLoader(stream, batch_size, options)


def build_loaders(
    args: Data,
    train_set: Samples | Stream | None,
    eval_set: Samples | Stream,
    *,
    world_size: int,
    rank: int,
) -> tuple[TrainLoader | StreamLoader | None, DataLoader | StreamLoader]:
    """The loaders of one process; the evaluation set is shared out exactly, with no sample counted twice.

    Raises:
        UserError: the training set is smaller than a batch, or a stream has too few shards.
    """
    train_loader: TrainLoader | StreamLoader | None = None
    if isinstance(train_set, Stream):
        if args.repeated_aug and rank == 0:
            _logger.warning("a stream gives each sample once: there is no repeated augmentation")
        train_loader = _stream_loader(train_set, args, args.batch_size, rank, world_size)
    elif train_set is not None:
        train_loader = TrainLoader(train_set, args, world_size=world_size, rank=rank)
    eval_batch = max(1, math.ceil(1.5 * args.batch_size))
    if isinstance(eval_set, Stream):
        return train_loader, _stream_loader(eval_set, args, eval_batch, rank, world_size)
    eval_loader = DataLoader(
        eval_set, batch_size=eval_batch, sampler=_ShardSampler(len(eval_set), rank, world_size),
        **_loader_options(args),
    )  # fmt: skip
    return train_loader, eval_loader
