"""Images that cannot be read, and the cache in memory."""

import logging
import os
import select
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vim.data import LEFT_OUT, build_datasets, build_loaders
from vim.data import images as images_module
from vim.data.images import BadImageError, decode
from vim.engine import run
from vim.errors import UserError
from vim.flags import MAX_IMAGE_PIXELS


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
        monkeypatch.setattr(images_module, "free_memory", lambda free=free: free)
        monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", str(processes))
        with pytest.raises(UserError, match="--cache: the images take more than"):
            build_datasets(parsed("--data-path", colours, "--cache"))


# Two columns, dark and bright, of which the mean must come out in 8 bits.
DARK, BRIGHT = 40, 200
SIXTEEN = np.tile(np.array([[DARK * 257, BRIGHT * 257]], np.uint16), (4, 2))
EIGHT = np.tile(np.array([[DARK, BRIGHT]], np.uint8), (4, 2))


def palette_image():
    image = Image.fromarray(EIGHT).quantize(4)
    image.info["transparency"] = bytes([255, 128, 0, 255])
    return image


def images_of_every_mode(folder):
    """Files of the same picture in modes that Pillow has, by name."""
    files = {
        "16 bit.png": Image.fromarray(SIXTEEN), "16 bit.tif": Image.fromarray(SIXTEEN),
        "16 bit.pgm": Image.fromarray(SIXTEEN),
        "big endian.tif": Image.frombytes("I;16B", (4, 4), SIXTEEN.astype(">u2").tobytes()),
        "grey.png": Image.fromarray(EIGHT), "alpha.png": Image.fromarray(EIGHT).convert("LA"),
        "rgba.png": Image.merge("RGBA", [Image.fromarray(EIGHT)] * 3 + [Image.new("L", (4, 4), 7)]),
        "palette.png": palette_image(), "cmyk.tif": Image.fromarray(EIGHT).convert("RGB").convert("CMYK"),
        "cmyk.jpg": Image.fromarray(np.kron(EIGHT, np.ones((8, 8), np.uint8))).convert("RGB").convert("CMYK"),
    }  # fmt: skip
    for name, image in files.items():
        image.save(folder / name, **({"quality": 100} if name.endswith(".jpg") else {}))
    return list(files)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.filterwarnings("error")
def test_every_mode_gives_the_same_eight_bits(tmp_path, mode):
    """16 bits are scaled, neither cut to white nor to black; transparency is left out."""
    for name in images_of_every_mode(tmp_path):
        pixels = np.asarray(decode(tmp_path / name, mode)).reshape(-1, 3 if mode == "RGB" else 1)
        for value, expected in ((pixels.min(), DARK), (pixels.max(), BRIGHT)):
            # JPEG rounds its coefficients, and CMYK's inks.
            assert abs(int(value) - expected) <= (3 if name.startswith("cmyk") else 0), name
    scaled = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(scaled).save(tmp_path / "ramp.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "ramp.png", "L")), np.round(scaled / 257))


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_values_of_unknown_range_are_refused_by_their_mode(tmp_path, kind, mode):
    Image.fromarray(np.linspace(0, 1000, 16).reshape(4, 4).astype(kind)).save(tmp_path / "x.tif")
    with pytest.raises(BadImageError, match=rf"x\.tif has mode {mode}.*of unknown range: convert it"):
        decode(tmp_path / "x.tif", "RGB")


@pytest.mark.parametrize("workers", [0, 1])
def test_images_beyond_the_limit(parsed, colours, workers):
    """40 × 48 pixels: taken at that limit, in workers too, and refused one below it."""
    for limit, words in ((1920, None), (1919, "more pixels than --max-image-pixels allows")):
        args = parsed("--data-path", colours, "--max-image-pixels", limit, "--num_workers", workers)
        train, test, _ = build_datasets(args)
        _, loader = build_loaders(args, train, test, world_size=1, rank=0)
        if words is None:
            assert sum(len(targets) for _, targets in loader) == 6
        else:
            with pytest.raises(UserError, match=words):
                list(loader)
    images_module.limit_pixels(MAX_IMAGE_PIXELS)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_die_with_their_parent(parsed, colours):
    """A parent killed by SIGKILL says nothing to its workers, and these wait for an image that never comes."""
    for path in (colours / "val" / "blue").iterdir():
        path.unlink()
        os.mkfifo(path)
    args = parsed("--data-path", colours, "--num_workers", 2)
    _, loader = build_loaders(args, *build_datasets(args)[:2], world_size=1, rank=0)
    read, write = os.pipe()
    if (parent := os.fork()) == 0:
        iterator = iter(loader)
        os.write(write, b"started")
        next(iterator)
    os.close(write)
    assert os.read(read, 7) == b"started"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    # The pipe is at its end when the last process that holds it is gone.
    assert select.select([read], [], [], 60)[0], "workers outlive their parent"
    assert os.read(read, 1) == b""
    os.close(read)
