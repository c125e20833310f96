"""One flipped bit anywhere in a checkpoint: the same content is read, or the file is refused with a sentence."""

import random

import pytest
import torch

from vim.engine import checkpoints
from vim.engine.run import run
from vim.models import CheckpointError, load_checkpoint

UNIFORM, OF_THE_ARCHIVE = 100, 200


def same(first, second):
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def attempt(path):
    """The file's content and no message, or None and why not."""
    try:
        return load_checkpoint(path), ""
    except CheckpointError as error:
        return None, str(error)


@pytest.fixture(scope="module")
def checkpoint(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(
        [
            *("--model", "vim_nano_patch4_32", "--model-kwargs", "depth=1", "embed_dim=16", "--input-size", "16"),
            *("--batch-size", "8", "--epochs", "1", "--num_workers", "0", "--device", "cpu"),
            *("--data-path", str(tree), "--output_dir", str(folder)),
        ]
    )  # fmt: skip
    return folder / "checkpoint.pth"


def bits(content):
    """Positions of bits: anywhere, and in what describes the parts, where most bits hold no data of a tensor."""
    random.seed(0)
    last = content.rindex(b"PK\x01\x02")
    directory = range(content.index(b"PK\x01\x02"), len(content))
    headers = [k + at for k in range(last) if content.startswith(b"PK\x03\x04", k) for at in range(30)]
    for _ in range(UNIFORM):
        yield random.randrange(len(content)), random.randrange(8)
    for _ in range(OF_THE_ARCHIVE // 2):
        yield random.choice(directory), random.randrange(8)
        yield random.choice(headers), random.randrange(8)


def test_flipped_bits(checkpoint, tmp_path):
    content, expected = checkpoint.read_bytes(), load_checkpoint(checkpoint)
    path = tmp_path / "flipped.pth"
    counts = {"refused": 0, "same": 0}
    for at, bit in bits(content):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        loaded, message = attempt(path)
        if loaded is None:
            assert "\n" not in message, (at, bit)
            assert str(path) in message, (at, bit)
            counts["refused"] += 1
        else:
            assert same(loaded, expected), (at, bit)
            counts["same"] += 1
    assert sum(counts.values()) == UNIFORM + OF_THE_ARCHIVE
    # Nearly all of a file is data: a check that refuses little would not be one.
    assert counts["refused"] > UNIFORM


def test_every_fifth_bit_of_a_small_file(tmp_path):
    """Most of it is names, sizes and places: what an archive's checksums do not cover."""
    path = tmp_path / "small.pth"
    torch.save(expected := {"a": torch.arange(6.0), "b": 3}, path)
    content = path.read_bytes()
    refused = 0
    for at in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        loaded, message = attempt(path)
        assert "\n" not in message if loaded is None else same(loaded, expected), at
        refused += loaded is None
    assert 8 * len(content) / 5 * 0.4 < refused < 8 * len(content) / 5 * 0.7


def test_auto_goes_back_to_the_checkpoint_before(checkpoint, tmp_path):
    """Of ten damaged files none serves: each time the one before it does, whose content is that of its own time."""
    good = load_checkpoint(checkpoint)
    content = checkpoint.read_bytes()
    random.seed(1)
    checkpoints.save_atomically({**good, "step": 17}, tmp_path / checkpoints.PREVIOUS)
    for _ in range(10):
        flipped = bytearray(content)
        flipped[random.randrange(200, len(content) // 2)] ^= 1 << random.randrange(8)
        (tmp_path / checkpoints.LAST).write_bytes(flipped)
        loaded = checkpoints.read("auto", str(tmp_path))
        assert loaded["step"] == 17 or same(loaded, good)
