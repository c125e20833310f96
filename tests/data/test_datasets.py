"""Each data set by its name: the samples, labels and classes it gives, and what it says of data that is not there."""

import gzip
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from vim.data import build_datasets, build_loaders
from vim.data.datasets import build_dataset
from vim.data.fmnist import CLASSES
from vim.errors import UserError


def brightest(image):
    """Channel of the largest mean: 0 red, 1 green, 2 blue."""
    return int(image.mean(dim=(1, 2)).argmax())


def test_image_folder(parsed, colours):
    train, test, classes = build_datasets(parsed("--data-path", colours))
    assert (len(train), len(test), classes) == (12, 6, 3)
    assert train.classes == test.classes == ["blue", "green", "red"]
    for data, count in ((train, 4), (test, 2)):
        targets = [data[i][1] for i in range(len(data))]
        assert targets == [k for k in range(3) for _ in range(count)]
    for image, target in (test[i] for i in range(6)):
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert brightest(image) == 2 - target


def test_grey_images(parsed, colours):
    _, test, _ = build_datasets(parsed("--data-path", colours, "--in-chans", 1))
    assert test[0][0].shape == (1, 32, 32)


def test_splits_must_agree(parsed, colours):
    (colours / "val" / "red").rename(colours / "val" / "pink")
    with pytest.raises(UserError, match="other names"):
        build_datasets(parsed("--data-path", colours))


def test_evaluation_set_without_splits(parsed, colours):
    """ImageNet-V2, -R, -A and -Sketch hold their class folders directly; training sets must have their splits."""
    flags = ("--data-path", colours / "val")
    _, test, classes = build_datasets(parsed(*flags, "--eval", "--resume", "x.pth"))
    assert (len(test), classes) == (6, 3)
    with pytest.raises(UserError, match="is not a folder"):
        build_datasets(parsed(*flags))


def test_cifar(parsed, tmp_path):
    """CIFAR-100 as its archive unpacks: pickled rows of 3 × 32 × 32 bytes."""
    from torchvision.datasets import CIFAR100

    with pytest.raises(UserError, match="does not hold CIFAR-100"):
        build_datasets(parsed("--data-set", "CIFAR", "--data-path", tmp_path))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (2, 3 * 32 * 32), dtype=np.uint8)
    files = {name: {"data": rows, "fine_labels": [17, 3]} for name in ("train", "test")}
    files["meta"] = {"fine_label_names": [f"class {k}" for k in range(100)]}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR100, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        train, test, classes = build_datasets(
            parsed("--data-set", "CIFAR", "--data-path", tmp_path, "--eval-crop-ratio", 1.0)
        )
    assert (len(train), classes, test[0][1], test[1][1]) == (2, 100, 17, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.from_numpy(rows[1].reshape(3, 32, 32)) / 255
    torch.testing.assert_close(test[1][0], (pixels - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist(parsed, tmp_path, name, year):
    """Labels at each level of the taxonomy, numbered by their first appearance in the training split."""
    categories = [
        {"id": 7, "name": "Parus major", "genus": "Parus", "kingdom": "Animalia"},
        {"id": 8, "name": "Parus minor", "genus": "Parus", "kingdom": "Animalia"},
        {"id": 9, "name": "Bellis perennis", "genus": "Bellis", "kingdom": "Plantae"},
    ]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for split, ids in (("train", (9, 7, 8)), ("val", (8, 9))):
        content = {"images": [], "annotations": []}
        for k, category in enumerate(ids):
            path = f"{split}{k}.jpg"
            Image.new("RGB", (40, 40), (category * 20, 0, 0)).save(tmp_path / path)
            content["images"].append({"id": 100 + k, "file_name": path})
            content["annotations"].append({"image_id": 100 + k, "category_id": category})
        (tmp_path / f"{split}{year}.json").write_text(json.dumps(content))
    flags = ("--data-set", name, "--data-path", tmp_path)
    for level, names, targets in (
        ("name", ["Bellis perennis", "Parus major", "Parus minor"], [2, 0]),
        ("genus", ["Bellis", "Parus"], [1, 0]),
        ("kingdom", ["Plantae", "Animalia"], [1, 0]),
    ):
        _, test, classes = build_datasets(parsed(*flags, "--inat-category", level))
        assert classes == len(names)
        assert test.classes == names
        assert [test[i][1] for i in range(2)] == targets
    with pytest.raises(UserError, match="labels by 'order'"):
        build_datasets(parsed(*flags, "--inat-category", "order"))


def write_idx(path, array, *, cut=0):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    content = header + array.tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_a_folder(parsed, tmp_path, suffix):
    """The original four idx files, gzipped or not, in place of the embedded subset."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 6), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        arrays[split] = images, labels
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", labels)
    flags = ("--data-set", "FMNIST", "--data-path", tmp_path, "--in-chans", 1, "--input-size", 28)
    train, test, classes = build_datasets(parsed(*flags, "--eval-crop-ratio", 1.0))
    assert (len(train), len(test), classes, train.classes) == (6, 4, 10, list(CLASSES))
    assert [test[i][1] for i in range(4)] == [0, 1, 2, 3]
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    expected = (torch.from_numpy(arrays["t10k"][0][2]) / 255 - mean) / std
    torch.testing.assert_close(test[2][0][0], expected)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", arrays["t10k"][0], cut=5)
    with pytest.raises(UserError, match="truncated"):
        build_datasets(parsed(*flags))
    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").unlink()
    with pytest.raises(UserError, match="is missing"):
        build_datasets(parsed(*flags))


def test_embedded_fashion_mnist(parsed):
    train, test, classes = build_datasets(parsed("--data-set", "FMNIST"))
    assert (len(train), len(test), classes) == (10_000, 2_000, 10)
    for data, each in ((train, 1000), (test, 200)):
        assert np.bincount(data.images.labels).tolist() == [each] * 10


# Readers of timm


def tar_of(folder, path):
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*.jpg")):
            archive.add(file, arcname=str(file.relative_to(folder)))


@pytest.mark.parametrize("workers", [0, 2])
def test_tar(parsed, colours, workers):
    """One tar file per split, with a folder per class inside: the samples of the unpacked folder."""
    for split in ("train", "val"):
        tar_of(colours / split, colours / f"{split}.tar")
    flags = ("--data-set", "tar/", "--data-path", colours, "--eval-split", "val", "--num_workers", workers)
    train, test, classes = build_datasets(parsed(*flags))
    assert (len(train), len(test), classes, test.classes) == (12, 6, 3, ["blue", "green", "red"])
    _, folder, _ = build_datasets(parsed("--data-path", colours))
    _, loader = build_loaders(parsed(*flags), train, test, world_size=1, rank=0)
    images, targets = (torch.cat(part) for part in zip(*loader, strict=True))
    assert targets.tolist() == [0, 0, 1, 1, 2, 2]
    for k in range(6):
        assert torch.equal(images[k], folder[k][0])
    with pytest.raises(UserError, match=r"validation\.tar is missing"):
        build_datasets(parsed("--data-set", "tar/", "--data-path", colours))


def test_hugging_face(parsed, colours, tmp_path, monkeypatch):
    """A local folder through the datasets library, with its labels' names."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (colours / "val").rename(colours / "validation")
    monkeypatch.chdir(colours.parent)
    flags = ("--data-set", "hfds/colours", "--data-path", tmp_path / "cache")
    train, test, classes = build_datasets(parsed(*flags))
    assert (len(train), len(test), classes, test.classes) == (12, 6, 3, ["blue", "green", "red"])
    for image, target in (test[i] for i in range(6)):
        assert brightest(image) == 2 - target
    with pytest.raises(UserError, match="hfds/absent cannot be read"):
        build_datasets(parsed("--data-set", "hfds/absent", "--data-path", tmp_path))


@pytest.mark.parametrize(
    ("prefix", "module", "package"),
    [("hfds", "datasets", "datasets"), ("tfds", "tensorflow_datasets", "tensorflow-datasets"),
     ("tfds", "tensorflow", "tensorflow-datasets"), ("hfids", "datasets", "datasets")],
)  # fmt: skip
def test_missing_library_is_named(parsed, tmp_path, monkeypatch, prefix, module, package):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    readers = ("timm.data.readers.reader_hf", "timm.data.readers.reader_tf")
    for name in [m for m in sys.modules if m.startswith(readers)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=f"pip install {package}"):
        build_datasets(parsed("--data-set", f"{prefix}/x", "--data-path", tmp_path, "--num-classes", 3))


def test_unknown_name(parsed, tmp_path):
    with pytest.raises(UserError, match="expected one of IMNET, CIFAR"):
        build_datasets(parsed("--data-set", "torch/cifar10", "--data-path", tmp_path))


def test_folders_as_torchvision_reads_them(parsed, colours, caplog):
    """Links are followed, hidden names are neither classes nor images, nested folders count; the split is said."""
    caplog.set_level("INFO", "vision_mamba")
    train = colours / "train"
    (colours / "elsewhere").mkdir()
    (train / "red" / "3.jpg").rename(colours / "elsewhere" / "far.jpg")
    (train / "red" / "nested").symlink_to(colours / "elsewhere")
    (train / "green").rename(colours / "green images")
    (train / "green").symlink_to(colours / "green images")
    data, _, classes = build_datasets(parsed("--data-path", colours))
    expected = torchvision.datasets.ImageFolder(str(train)).samples
    assert [(str(path), target) for path, target in data.images.samples] == expected
    assert (len(expected), classes) == (12, 3)
    assert "training split: 12 images in 3 classes" in caplog.text
    assert "evaluation split: 6 images in 3 classes" in caplog.text
    for split in ("train", "val"):
        (colours / split / ".ipynb_checkpoints").mkdir()
        (colours / split / ".ipynb_checkpoints" / "0.jpg").write_bytes(b"")
    (train / "blue" / "._0.jpg").write_bytes(b"")
    # A link to a folder above it does not end in a cycle.
    (train / "blue" / "again").symlink_to(train)
    (train / "red" / "up").symlink_to(train / "red")
    data, _, classes = build_datasets(parsed("--data-path", colours))
    assert (len(data), classes) == (12, 3)


def test_unread_files_and_single_classes_are_said(parsed, colours, caplog):
    for name in ("a.gif", "b.GIF", "c.txt", "README"):
        (colours / "val" / "red" / name).write_bytes(b"")
    build_dataset(False, parsed("--data-path", colours))
    assert "val: 4 files are of types that are not read (.gif 2, no ending 1, .txt 1)" in caplog.text
    assert "single class" not in caplog.text
    for name in ("red", "green"):
        shutil.rmtree(colours / "val" / name)
    build_dataset(False, parsed("--data-path", colours))
    assert "the evaluation split has a single class" in caplog.text


def test_broken_tar(parsed, colours, tmp_path):
    """Cut, empty and without images: a sentence each; cut inside its last image, a bad image."""
    path = tmp_path / "validation.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(colours / "val", ".")
    whole = path.read_bytes()
    flags = ("--data-set", "tar/", "--data-path", tmp_path, "--eval", "--resume", "x")
    for content in (b"", b"no tar", whole[:700], whole[:2000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"validation\.tar is damaged"):
            build_datasets(parsed(*flags))
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a/readme.txt"))
    with pytest.raises(UserError, match=r"validation\.tar is damaged, or no tar file of one folder of images"):
        build_datasets(parsed(*flags))
    path.write_bytes(whole)
    _, data, _ = build_datasets(parsed(*flags))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        [data[i] for i in range(len(data))]


def test_damaged_fashion_mnist(parsed, tmp_path):
    flags = ("--data-set", "FMNIST", "--data-path", tmp_path, "--eval", "--resume", "x")
    images, labels = tmp_path / "t10k-images-idx3-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz"

    def refused(words):
        with pytest.raises(UserError, match=words):
            build_datasets(parsed(*flags))

    write_idx(images, np.zeros((4, 28, 28), np.uint8))
    write_idx(labels, np.arange(4, dtype=np.uint8))
    assert len(build_datasets(parsed(*flags))[1]) == 4
    good = images.read_bytes()
    for content in (good[:-9], b"no gzip", b"", good[:30] + b"xx" + good[32:]):
        images.write_bytes(content)
        refused("t10k-images-idx3-ubyte.gz (cannot be read|is not an idx file)")
    images.write_bytes(gzip.compress(bytes([0, 0, 8, 255, 0])))
    refused("not an idx file")
    for array in (np.zeros((4, 32, 32), np.uint8), np.zeros((3, 28, 28), np.uint8), np.zeros(4, np.uint8)):
        write_idx(images, array)
        refused(r"expected \(n, 28, 28\)")
    images.write_bytes(good)
    write_idx(labels, np.array([0, 1, 2, 10], np.uint8))
    refused("labels .* up to 10, expected")
    write_idx(images, np.zeros((0, 28, 28), np.uint8))
    write_idx(labels, np.zeros(0, np.uint8))
    refused("has no images")
