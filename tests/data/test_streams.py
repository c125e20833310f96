"""Data sets that are read as a stream: WebDataset shards and streamed Hugging Face data."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vim.data import build_datasets, build_loaders
from vim.data.datasets import build_dataset
from vim.errors import UserError


def shards(folder, split, images, per_shard):
    """WebDataset shards of (class, JPEG bytes), and their names and lengths."""
    names, lengths = [], []
    for number, start in enumerate(range(0, len(images), per_shard)):
        names.append(f"{split}-{number:03d}.tar")
        part = images[start : start + per_shard]
        lengths.append(len(part))
        with tarfile.open(folder / names[-1], "w") as archive:
            for k, (target, content) in enumerate(part):
                for suffix, data in (("jpg", content), ("cls", str(target).encode())):
                    entry = tarfile.TarInfo(f"{split}{start + k:04d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": len(images)}


def jpeg(value):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (value, value, value)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def webdataset(tmp_path):
    """24 training and 13 evaluation images in shards of 6 and 4; an image's grey value is 10 times its number."""
    pytest.importorskip("webdataset")
    splits = {}
    for split, count, per_shard in (("train", 24, 6), ("validation", 13, 4)):
        splits[split] = shards(tmp_path, split, [(k % 3, jpeg(10 * k)) for k in range(count)], per_shard)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    return tmp_path


def webdataset_flags(folder, *argv):
    return (
        "--data-set", "wds/synthetic", "--data-path", folder, "--num-classes", 3, "--eval-crop-ratio", 1.0,
        "--aa", "none", "--reprob", 0, "--color-jitter", 0, *argv,
    )  # fmt: skip


def numbers(images):
    """Numbers of images by their grey value."""
    grey = images.mean(dim=(2, 3))[:, 0] * 0.229 + 0.485
    return (grey * 25.5).round().int().tolist()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_webdataset_evaluation_is_exact(parsed, webdataset, workers, world_size):
    """Every sample once over all ranks and workers, none padded, where timm would pad or drop."""
    seen, labels = [], []
    for rank in range(world_size):
        args = parsed(*webdataset_flags(webdataset, "--num_workers", workers))
        test, classes = build_dataset(False, args)
        _, loader = build_loaders(args, None, test, world_size=world_size, rank=rank)
        for images, targets in loader:
            seen += numbers(images)
            labels += targets.tolist()
    assert classes == 3
    assert sorted(seen) == list(range(13))
    assert labels == [k % 3 for k in seen]


def test_webdataset_training(parsed, webdataset):
    """Shuffled anew in each epoch by the seed alone; an epoch goes on inside where it stopped."""

    def epoch(number, seed=0, start=0):
        args = parsed(*webdataset_flags(webdataset, "--num_workers", 2, "--seed", seed))
        train, test, _ = build_datasets(args)
        loader, _ = build_loaders(args, train, test, world_size=1, rank=0)
        loader.set_epoch(number)
        loader.set_start_step(start)
        assert len(loader) == 6
        return torch.stack([images for images, _ in loader])

    first = epoch(0)
    assert first.shape == (6, 4, 3, 32, 32)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(0, seed=1))
    assert torch.equal(first[4:], epoch(0, start=4))


def test_webdataset_shares_by_shard(parsed, webdataset):
    """Two ranks read other samples; fewer shards than readers are refused, where timm would wait for ever."""
    seen = []
    for rank in range(2):
        args = parsed(*webdataset_flags(webdataset, "--num_workers", 2, "--no-train-mode"))
        train, test, _ = build_datasets(args)
        loader, _ = build_loaders(args, train, test, world_size=2, rank=rank)
        loader.set_epoch(0)
        seen.append({n for images, _ in loader for n in numbers(images)})
    assert not seen[0] & seen[1]
    train, test, _ = build_datasets(args)
    with pytest.raises(UserError, match="4 shards for 4 processes with 2 workers"):
        build_loaders(args, train, test, world_size=4, rank=0)
    with pytest.raises(UserError, match="is a stream"):
        build_datasets(parsed(*webdataset_flags(webdataset, "--cache")))
    with pytest.raises(UserError, match="pass --num-classes"):
        build_datasets(parsed(*webdataset_flags(webdataset, "--num-classes", 0)))
    with pytest.raises(UserError, match="'valid'"):
        build_datasets(parsed(*webdataset_flags(webdataset, "--eval-split", "valid")))


def test_webdataset_with_bad_images(parsed, webdataset, caplog):
    splits = json.loads((webdataset / "_info.json").read_text())["splits"]
    splits["validation"] = shards(webdataset, "validation", [(0, jpeg(0)), (1, b"no image"), (2, jpeg(20))], 4)
    (webdataset / "_info.json").write_text(json.dumps({"splits": splits}))

    def evaluate(*argv):
        args = parsed(*webdataset_flags(webdataset, *argv))
        test, _ = build_dataset(False, args)
        _, loader = build_loaders(args, None, test, world_size=1, rank=0)
        return [n for images, _ in loader for n in numbers(images)], int(test.bad_images().sum())

    assert evaluate("--on-bad-image", "replace") == ([0, 2], 1)
    with pytest.raises(UserError, match="--on-bad-image replace"):
        evaluate()


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A local Hugging Face data set "synthetic" of Parquet files with the images of the shards above."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    splits, files = [], []
    for split, count in (("train", 24), ("validation", 13)):
        for shard in range(4):
            chosen = range(shard, count, 4)
            content = {
                "image": [{"bytes": jpeg(10 * k), "path": None} for k in chosen], "label": [k % 3 for k in chosen]
            }  # fmt: skip
            rows = datasets.Dataset.from_dict(content, features=features)
            rows.to_parquet(tmp_path / "synthetic" / f"{split}-{shard}.parquet")
        splits.append({"name": split, "num_examples": count, "num_bytes": 1})
        files.append({"split": split, "path": f"{split}-*"})
    # The number of samples must be known beforehand; data sets on the hub say it in their card, in YAML or JSON.
    info = {"dataset_info": {"splits": splits}, "configs": [{"config_name": "default", "data_files": files}]}
    (tmp_path / "synthetic" / "README.md").write_text(f"---\n{json.dumps(info)}\n---\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_hugging_face_stream(parsed, parquet, workers, world_size):
    """Evaluation reads every sample once over all ranks and workers; training resumes inside an epoch."""
    flags = (
        "--data-set", "hfids/synthetic", "--data-path", parquet / "cache", "--num-classes", 3, "--num_workers", workers,
        "--eval-crop-ratio", 1.0, "--no-train-mode",
    )  # fmt: skip
    seen, labels = [], []

    def loaders(rank):
        train, test, _ = build_datasets(parsed(*flags))
        return build_loaders(parsed(*flags), train, test, world_size=world_size, rank=rank)

    for rank in range(world_size):
        for images, targets in loaders(rank)[1]:
            seen += numbers(images)
            labels += targets.tolist()
    assert sorted(seen) == list(range(13))
    assert labels == [k % 3 for k in seen]

    def epoch(start):
        loader = loaders(0)[0]
        loader.set_epoch(1)
        loader.set_start_step(start)
        return [numbers(images) for images, _ in loader], len(loader)

    whole, length = epoch(0)
    assert len(whole) == length >= 24 // 4 // world_size
    assert whole[1:] == epoch(1)[0]


def test_sixteen_bits_in_a_stream(parsed, webdataset):
    """Scaled as in folders, not cut by timm's reader; a mode that is refused is a bad image."""
    splits = json.loads((webdataset / "_info.json").read_text())["splits"]

    def write(*images):
        files = []
        for image in images:
            image.save(file := io.BytesIO(), "TIFF")
            files.append(file.getvalue())
        splits["validation"] = shards(webdataset, "validation", list(enumerate(files)), 1)
        (webdataset / "_info.json").write_text(json.dumps({"splits": splits}))

    sixteen = Image.fromarray(np.full((40, 40), 100 * 257, np.uint16))
    write(sixteen, Image.fromarray(np.zeros((40, 40), np.float32)))
    for policy in ("replace", "stop"):
        args = parsed(*webdataset_flags(webdataset, "--on-bad-image", policy))
        test, _ = build_dataset(False, args)
        _, loader = build_loaders(args, None, test, world_size=1, rank=0)
        if policy == "replace":
            ((images, _),) = loader
            assert numbers(images) == [10]
            assert test.bad_images() == 1
        else:
            with pytest.raises(UserError, match="mode F"):
                list(loader)
