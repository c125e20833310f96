"""Data sets that are read as a stream: WebDataset shards, TFDS, streamed Hugging Face data, through timm's readers.

A stream has no index: its order is that of timm's reader for (seed, epoch, rank, worker), and the random numbers of a
sample's augmentation are seeded from these and its position. A run with the same number of workers therefore sees the
same batches; one that is resumed inside an epoch reads and drops the batches before.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.readers import reader_wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vim.data.images import BadImageError, eight_bits
from vim.data.seeding import seed_of, seed_sample
from vim.errors import UserError
from vim.flags import Data

_logger = logging.getLogger("vision_mamba.data")


class Stream(IterableDataset):
    """Transformed images and class numbers of one rank's share of a stream.

    Args:
        source: timm's data set without a transform.
        transform: PIL image → tensor.
        is_train: shuffled and endless, cut to whole batches; else every sample once over all ranks.
        args: parsed flags.
        mode: of the images, "RGB" or "L".
    """

    def __init__(
        self, source: IterableImageDataset, transform: Callable[[Image.Image], torch.Tensor], *, is_train: bool,
        args: Data, mode: str,
    ) -> None:  # fmt: skip
        self.mode = mode
        self.source, self.transform, self.is_train = source, transform, is_train
        self.seed, self.policy = args.seed, args.on_bad_image
        self.epoch, self.rank, self.world_size = 0, 0, 1
        self._bad = torch.zeros(1, dtype=torch.int64).share_memory_()

    def share(self, rank: int, world_size: int, workers: int) -> None:
        """Take one rank's share.

        Raises:
            UserError: there are fewer shards than readers, some of which would wait for ever.
        """
        self.rank, self.world_size = rank, world_size
        reader = self.source.reader
        # An evaluation set is read whole by every rank, which keeps each world_size-th sample: timm would pad or drop.
        reader.dist_rank, reader.dist_num_replicas = (rank, world_size) if self.is_train else (0, 1)
        self.source.set_loader_cfg(num_workers=workers)
        shards = len(getattr(getattr(reader, "split_info", None), "filenames", ()) or ())
        if self.is_train and 0 < shards < world_size * workers:
            raise UserError(
                f"the training set has {shards} shards for {world_size} processes with {workers} workers each: pass "
                f"--num-workers {max(1, shards // world_size)}, or make smaller shards"
            )

    def samples(self) -> int:
        """Samples of this rank in an epoch, in training a multiple of the batch of each worker."""
        return len(self.source) if self.is_train else math.ceil(len(self.source) / self.world_size)

    def bad_images(self) -> torch.Tensor:
        """Number of images that this process and its workers have skipped so far: (1,)."""
        return self._bad.clone()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        # In a worker, so nothing else of the process reads shards: timm itself skips whatever cannot be read.
        reader_wds.log_and_continue = self._on_error
        worker = get_worker_info()
        samples = iter(self.source)
        if not self.is_train:
            samples = itertools.islice(samples, self.rank, None, self.world_size)
        for k, (image, target) in enumerate(samples):
            seed_sample(self.seed, self.epoch, self.rank, worker.id, k)
            try:
                image = eight_bits(image, self.mode, f"image {k} of worker {worker.id}")
            except BadImageError as error:
                self._on_error(error)
                continue
            yield self.transform(image), int(target)

    def _on_error(self, error: Exception) -> bool:
        if self.policy == "stop" or isinstance(error, TypeError | reader_wds.WdsTargetKeyError):
            raise UserError(
                f"a sample of the shards cannot be read ({error!r}): mend the shard, or go on without such samples by "
                "--on-bad-image replace"
            ) from error
        self._bad += 1
        _logger.warning("a sample of the shards cannot be read (%r): it is skipped", error)
        return True


class StreamLoader:
    """Batches of a stream, with the interface of the loaders of indexed sets."""

    def __init__(self, stream: Stream, batch_size: int, options: dict[str, Any]) -> None:
        self.dataset, self.batch_size = stream, batch_size
        self.generator = torch.Generator()
        # Readers keep a state between epochs; a worker process starts afresh.
        options = {**options, "num_workers": max(1, options["num_workers"])}
        self.loader = DataLoader(
            stream, batch_size=batch_size, drop_last=stream.is_train, generator=self.generator, **options
        )
        batches = stream.samples() / batch_size
        self.steps_per_epoch = int(batches) if stream.is_train else math.ceil(batches)
        if stream.is_train and self.steps_per_epoch == 0:
            raise UserError(f"the training set gives fewer samples than one batch: lower --batch-size {batch_size}")
        self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; it starts at its first batch."""
        self.dataset.epoch, self._start = epoch, 0
        self.dataset.source.set_epoch(epoch)

    def set_start_step(self, step: int) -> None:
        """Start the next iteration at this batch, by reading those before it."""
        self._start = step

    def batch_indices(self, step: int) -> list[int]:
        """None: samples of a stream have no index."""
        return []

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Workers, and through them timm's shuffling, are seeded from this generator.
        self.generator.manual_seed(seed_of(self.dataset.seed, self.dataset.epoch, self.dataset.rank))
        stop = self.steps_per_epoch if self.dataset.is_train else None
        return itertools.islice(iter(self.loader), self._start, stop)
