"""Clips: which frames are sampled, what is read, one transform for all frames, and a training that needs time."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim.data.clips import clip_folder, clip_transform, frame_indices
from vim.data.datasets import build_dataset
from vim.engine.arguments import parse_args
from vim.engine.run import main, run
from vim.errors import UserError
from vim.flags import Flags

SCRIPTS = Path(__file__).parents[2] / "scripts"


def frames(count: int = 6, size: int = 40) -> list[Image.Image]:
    """Frame t has the grey value 20 t."""
    return [Image.fromarray(np.full((size, size), 20 * t, np.uint8)) for t in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / split / "animation").mkdir(parents=True)
        first, *rest = frames()
        first.save(tmp_path / split / "animation" / "a.webp", save_all=True, append_images=rest, lossless=True)
        (tmp_path / split / "folder" / "clip").mkdir(parents=True)
        # By value 10 comes after 9, by letters before it.
        for t, frame in enumerate(frames()):
            frame.save(tmp_path / split / "folder" / "clip" / f"frame_{t + 8}.png")
    return tmp_path


def flags(folder: Path, *more: str) -> Flags:
    common = ["--data-set", "CLIPS", "--data-path", str(folder), "--num-frames", "3", "--input-size", "24"]
    return parse_args([*common, *more])


def test_frame_indices() -> None:
    assert frame_indices(8, 4, False) == [1, 3, 5, 7]
    assert frame_indices(9, 3, False) == [1, 4, 7]
    assert frame_indices(1, 4, False) == [0, 0, 0, 0]
    assert frame_indices(2, 4, False) == [0, 0, 1, 1]
    torch.manual_seed(0)
    drawn = [frame_indices(30, 3, True) for _ in range(200)]
    assert all(10 * k <= index < 10 * (k + 1) for indices in drawn for k, index in enumerate(indices))
    assert {index for indices in drawn for index in indices} == set(range(30))


def test_frames_of_files_and_folders(folder: Path) -> None:
    data, unread = clip_folder(folder / "val", "L", 3, False)
    assert data.classes == ["animation", "folder"]
    assert not unread
    for index in range(2):
        clip, target = data[index]
        assert target == index
        assert [np.asarray(frame)[0, 0] for frame in clip] == [20, 60, 100]


def test_evaluation_sample(folder: Path) -> None:
    """(channels, frames, side, side), normalised as images are."""
    data, classes = build_dataset(False, flags(folder, "--in-chans", "1"))
    sample, _ = data[1]
    assert (sample.shape, sample.dtype, classes) == ((1, 3, 24, 24), torch.float32, 2)
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    expected = (torch.tensor([20.0, 60.0, 100.0]) / 255 - mean) / std
    torch.testing.assert_close(sample[0, :, 12, 12], expected)


@pytest.mark.parametrize("aa", ["none", "rand-m5-n2"])
def test_frames_are_augmented_alike(folder: Path, aa: str) -> None:
    """A clip whose frames are one image stays one, whatever crop, flip, colours and erasing were drawn."""
    torch.manual_seed(0)
    transform = clip_transform(True, flags(folder, "--aa", aa, "--reprob", "1"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    drawn = [transform([image] * 4) for _ in range(5)]
    for clip in drawn:
        assert clip.shape == (3, 4, 24, 24)
        for t in range(1, 4):
            torch.testing.assert_close(clip[:, t], clip[:, 0])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("more", "words"), [
    (["--ThreeAugment"], "--ThreeAugment is for single images"),
    (["--aa", "original"], "--aa original is for single images"),
    (["--cache"], "--cache keeps images in memory"),
])  # fmt: skip
def test_what_is_for_images_is_refused(folder: Path, more: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_dataset(True, flags(folder, *more))


def test_bad_clips_are_said(folder: Path, monkeypatch) -> None:
    (folder / "val" / "animation" / "b.gif").write_bytes(b"GIF89a")
    (folder / "val" / "folder" / "empty").mkdir()
    (folder / "val" / "folder" / "video.mp4").write_bytes(b"")
    data, _ = clip_folder(folder / "val", "L", 3, False)
    with pytest.raises(UserError, match=r"b\.gif cannot be read as an animation"):
        data[1]
    with pytest.raises(UserError, match="empty has no frames"):
        data[3]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match="pip install torchcodec"):
        data[4]
    (folder / "val" / "void").mkdir()
    with pytest.raises(UserError, match="void has no clips"):
        clip_folder(folder / "val", "L", 3, False)
    assert main(["--data-set", "CLIPS", "--data-path", str(folder / "none")]) == 2


@pytest.fixture
def make_clips():
    """`scripts/make_clips.py` as a module."""
    spec = importlib.util.spec_from_file_location("make_clips", SCRIPTS / "make_clips.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_synthetic_clips(make_clips, tmp_path: Path) -> None:
    assert make_clips.main([str(tmp_path), "--train", "4", "--val", "4", "--frames", "3", "--size", "16"]) == 0
    for split in ("train", "val"):
        assert sorted(path.parent.name for path in (tmp_path / split).rglob("*.webp")) == [
            "down",
            "left",
            "right",
            "up",
        ]
    with Image.open(tmp_path / "val" / "left" / "0001.webp") as clip:
        assert (clip.n_frames, clip.size) == (3, (16, 16))


@pytest.mark.slow
def test_directions_are_learnt(make_clips, tmp_path: Path) -> None:
    """A tiny VideoMamba tells directions of movement apart, which no single frame shows; mixing of clips works."""
    make_clips.main([str(tmp_path / "clips"), "--train", "1600", "--val", "200"])
    recipe = SCRIPTS.parent / "vim" / "recipes" / "clips.yaml"
    common = ["--config", str(recipe), "--data-path", str(tmp_path / "clips"), "--device", "cpu"]
    run([*common, "--epochs", "1", "--cutmix", "1", "--mixup", "0.8", "--output-dir", str(tmp_path / "mixed")])
    record = run([*common, "--epochs", "8", "--output-dir", str(tmp_path / "run")])
    assert record["test_acc1"] > 60, json.dumps(record)
