"""Images that cannot be read, and the cache in memory."""

import logging
import os

import pytest
import torch
from PIL import Image

from vim.data import LEFT_OUT, build_datasets, build_loaders
from vim.data import images as images_module
from vim.data.images import BadImageError, decode
from vim.engine import run
from vim.errors import UserError


def spoil(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"not a picture")


def test_decode(tmp_path):
    """Every kind of damage is one error that names the file; modes are as asked for."""
    good = tmp_path / "good.png"
    Image.new("RGBA", (5, 4), (255, 0, 0, 128)).save(good)
    assert decode(good, "RGB").getpixel((0, 0)) == (255, 0, 0)
    assert decode(good, "L").mode == "L"
    with good.open("rb") as file:
        assert decode(file, "RGB").size == (5, 4)
    content = good.read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    spoil(tmp_path, "text.png")
    for name in ("cut.png", "empty.png", "text.png", "absent.png"):
        with pytest.raises(BadImageError, match=name):
            decode(tmp_path / name, "RGB")


def test_bad_image_stops_by_default(parsed, colours):
    spoil(colours / "train" / "green", "1.jpg")
    train, _, _ = build_datasets(parsed("--data-path", colours))
    assert train[4][1] == 1
    with pytest.raises(UserError, match=r"green/1\.jpg cannot be read .* --on-bad-image replace"):
        train[5]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_is_replaced_counted_and_logged_once(parsed, colours, caplog, workers, capfd):
    """In training the next good image takes its place; in evaluation it is left out. Workers share what they know."""
    logging.getLogger("vision_mamba.data").addHandler(handler := logging.StreamHandler())
    try:
        spoil(colours / "train" / "green", "1.jpg", "2.jpg")
        spoil(colours / "val" / "red", "1.jpg")
        args = parsed("--data-path", colours, "--on-bad-image", "replace", "--no-train-mode", "--num_workers", workers)
        train, test, _ = build_datasets(args)
        train_loader, test_loader = build_loaders(args, train, test, world_size=1, rank=0)
        for epoch in range(2):
            train_loader.set_epoch(epoch)
            targets = torch.cat([targets for _, targets in train_loader])
            # Green images 1 and 2 are now green image 3.
            assert targets.bincount().tolist() == [4, 4, 4]
        targets = torch.cat([targets for _, targets in test_loader])
        assert targets.tolist() == [0, 0, 1, 1, 2, LEFT_OUT]
    finally:
        logging.getLogger("vision_mamba.data").removeHandler(handler)
    assert train.bad_images().nonzero().flatten().tolist() == [5, 6]
    assert test.bad_images().sum() == 1
    lines = capfd.readouterr().err.splitlines()
    for name in ("green/1.jpg", "green/2.jpg", "red/1.jpg"):
        assert sum(name in line for line in lines) == 1, lines
    assert torch.equal(train[5][0], train[7][0])
    assert torch.equal(train[6][0], train[7][0])


def test_nothing_but_bad_images(parsed, colours):
    for name in ("blue", "green", "red"):
        spoil(colours / "train" / name, *(f"{i}.jpg" for i in range(4)))
    train, _, _ = build_datasets(parsed("--data-path", colours, "--on-bad-image", "replace"))
    with pytest.raises(UserError, match="in a row"):
        train[0]


def test_figures_leave_bad_images_out(colours, tmp_path):
    """A run over data with bad images: the count is in its record, and the evaluation is that of the good images."""
    flags = (
        "--model", "vim_nano_patch4_32", "--input-size", 32, "--batch-size", 4, "--num_workers", 2, "--device", "cpu",
        "--epochs", 1, "--no-repeated-aug", "--no-model-ema", "--data-path", colours,
    )  # fmt: skip
    spoil(colours / "train" / "green", "1.jpg")
    spoil(colours / "val" / "red", "0.jpg")
    record = run.run([*map(str, flags), "--on-bad-image", "replace", "--output_dir", str(tmp_path / "run")])
    assert record["bad_images"] == 2
    assert record["test_images"] == 5
    (colours / "val" / "red" / "0.jpg").unlink()
    checkpoint = str(tmp_path / "run" / "checkpoint.pth")
    clean = run.run(["--eval", "--resume", checkpoint, "--num_workers", "0"])
    assert clean["test_images"] == 5
    assert clean["test_acc1"] == record["test_acc1"]
    assert clean["test_loss"] == pytest.approx(record["test_loss"], rel=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_cache(parsed, colours, workers):
    """The same batches from memory, without the files."""
    flags = ("--data-path", colours, "--num_workers", workers, "--seed", 3)

    def batches(args, train, test):
        loaders = build_loaders(args, train, test, world_size=1, rank=0)
        return [torch.cat(part) for loader in loaders for part in zip(*loader, strict=True)]

    expected = batches(parsed(*flags), *build_datasets(parsed(*flags))[:2])
    args = parsed(*flags, "--cache")
    train, test, _ = build_datasets(args)
    for file in colours.rglob("*.jpg"):
        file.unlink()
    for first, second in zip(expected, batches(args, train, test), strict=True):
        assert torch.equal(first, second)


def test_cache_and_bad_images(parsed, colours):
    spoil(colours / "train" / "green", "1.jpg")
    with pytest.raises(UserError, match=r"green/1\.jpg"):
        build_datasets(parsed("--data-path", colours, "--cache"))
    flags = ("--data-path", colours, "--cache", "--on-bad-image", "replace", "--no-train-mode")
    train, _, _ = build_datasets(parsed(*flags))
    assert torch.equal(train[5][0], train[6][0])
    assert train.bad_images().sum() == 1


def test_cache_that_does_not_fit_is_refused(parsed, colours, monkeypatch):
    used = 12 * 40 * 48 * 3
    for free, processes in ((2 * used - 10_000, 1), (4 * used - 20_000, 2)):
        monkeypatch.setattr(images_module, "_free_memory", lambda free=free: free)
        monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", str(processes))
        with pytest.raises(UserError, match="--cache: the images take more than"):
            build_datasets(parsed("--data-path", colours, "--cache"))
