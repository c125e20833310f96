"""Batches are functions of (seed, epoch, position): whatever ran before, with any number of workers, from any step."""

import random

import numpy as np
import pytest
import torch

from vim.data import build_datasets, build_loaders
from vim.data.loaders import EpochSampler
from vim.data.seeding import seed_all, seed_of, seed_sample


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_decide_what_is_drawn():
    """The same key gives the same numbers, whatever was drawn before, for steps and for samples alike."""
    seed_all(5, 6, 7)
    expected = draw()
    draw()
    for seed in (seed_all, seed_sample):
        seed(5, 6, 7)
        assert draw() == expected
        seed(5, 6, 8)
        assert draw() != expected
    assert seed_of(1, 2) != seed_of(2, 1)
    assert 0 <= seed_of(-1, 2**40) < 2**32


def batches(parsed, colours, *argv, epoch=0, start=0, world_size=1, rank=0):
    args = parsed("--data-path", colours, "--batch-size", 2, *argv)
    train, test, _ = build_datasets(args)
    loader, _ = build_loaders(args, train, test, world_size=world_size, rank=rank)
    loader.set_epoch(epoch)
    loader.set_start_step(start)
    return [images for images, _ in loader]


def assert_equal(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sampling", ["--repeated-aug", "--no-repeated-aug"])
def test_batches_depend_on_seed_epoch_and_position_alone(parsed, colours, sampling):
    whole = batches(parsed, colours, sampling, epoch=1)
    assert len(whole) == 6
    torch.rand(7)
    assert_equal(whole, batches(parsed, colours, sampling, "--num_workers", 2, epoch=1))
    assert_equal(whole[4:], batches(parsed, colours, sampling, "--num_workers", 2, epoch=1, start=4))
    for other in (batches(parsed, colours, sampling), batches(parsed, colours, sampling, "--seed", 1, epoch=1)):
        assert not torch.equal(other[0], whole[0])


def test_ranks_share_the_batches_of_one_process(parsed, colours):
    """Step k of two ranks with 2 images each holds the images of step k of one process with 4, augmented alike."""
    one = batches(parsed, colours, "--batch-size", 4)
    two = [batches(parsed, colours, world_size=2, rank=r) for r in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        assert torch.equal(whole[0::2], parts[0])
        assert torch.equal(whole[1::2], parts[1])


def test_batch_indices(parsed, colours):
    args = parsed("--data-path", colours, "--batch-size", 4, "--no-train-mode")
    train, test, _ = build_datasets(args)
    loader, _ = build_loaders(args, train, test, world_size=1, rank=0)
    loader.set_epoch(2)
    loader.set_start_step(1)
    for step, (images, _) in enumerate(loader, start=1):
        expected = torch.stack([train[i][0] for i in loader.batch_indices(step)])
        assert torch.equal(images, expected)
    assert loader.sampler.start == 4


def test_every_sample_once_an_epoch():
    data = list(range(50))
    seen = [
        index for rank in range(2)
        for _, _, index in EpochSampler(data, repeated=False, seed=0, rank=rank, world_size=2)
    ]  # fmt: skip
    assert sorted(seen) == data


@pytest.mark.parametrize(("count", "kept"), [(600, 512), (30, 30)])
def test_repeated_augmentation_rounds_as_published_but_not_to_nothing(count, kept):
    """timm keeps a multiple of 256 samples; of a set smaller than that, all."""
    sampler = EpochSampler(list(range(count)), repeated=True, seed=0, rank=0, world_size=1)
    assert len(list(sampler)) == len(sampler) == kept
