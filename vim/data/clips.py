"""Clips: a folder per class of video files, animated images, or folders of frames, whose frames are sampled."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import v2

from vim.data.images import BadImageError, decode, eight_bits
from vim.data.transforms import SMALL_IMAGE, normalisation
from vim.errors import UserError
from vim.flags import Augmentation

# Read by Pillow, and by torchcodec.
ANIMATIONS = (".gif", ".webp", ".apng")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v")
_FRAMES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def frame_indices(length: int, count: int, at_random: bool) -> list[int]:
    """`count` frames of a clip of `length`, one from each of `count` equal segments: the middle one, or a random one.

    A clip shorter than that repeats frames.
    """
    offsets = torch.rand(count, device="cpu").tolist() if at_random else [0.5] * count
    return [min(length - 1, int((segment + offset) * length / count)) for segment, offset in enumerate(offsets)]


class ClipFiles(Dataset):
    """Frames of clips as lists of PIL images, with class numbers.

    Args:
        samples: path and class number of each clip.
        classes: names of the classes, by number.
        mode: "RGB" or "L".
        num_frames: frames of each clip.
        at_random: sample a random frame of each segment, else its middle.
    """

    def __init__(
        self, samples: list[tuple[Path, int]], classes: list[str], mode: str, num_frames: int, at_random: bool
    ) -> None:
        self.samples, self.classes, self.mode = samples, classes, mode
        self.num_frames, self.at_random = num_frames, at_random

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], int]:
        path, target = self.samples[index]
        return self._read(path), target

    def _choose(self, length: int, path: Path) -> list[int]:
        if length < 1:
            raise BadImageError(f"{path} has no frames")
        return frame_indices(length, self.num_frames, self.at_random)

    def _read(self, path: Path) -> list[Image.Image]:
        if path.is_dir():
            files = _frames_of(path)
            return [decode(files[i], self.mode) for i in self._choose(len(files), path)]
        if path.suffix.lower() in ANIMATIONS:
            return self._read_animation(path)
        return self._read_video(path)

    def _read_animation(self, path: Path) -> list[Image.Image]:
        try:
            with Image.open(path) as image:
                frames = []
                for i in self._choose(getattr(image, "n_frames", 1), path):
                    image.seek(i)
                    frames.append(eight_bits(image.copy(), self.mode, str(path)))
                return frames
        except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadImageError(f"{path} cannot be read as an animation ({type(error).__name__})") from error

    def _read_video(self, path: Path) -> list[Image.Image]:
        try:
            from torchcodec.decoders import VideoDecoder  # an optional dependency, which needs FFmpeg's libraries
        except (ImportError, RuntimeError, OSError) as error:
            raise UserError(
                f"{path} is a video, which torchcodec and FFmpeg read: pip install torchcodec and install ffmpeg, or "
                "cut the videos into folders of frames"
            ) from error
        try:
            decoder = VideoDecoder(str(path), dimension_order="NHWC")
            frames = decoder.get_frames_at(self._choose(len(decoder), path)).data.numpy()
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadImageError(f"{path} cannot be read as a video ({type(error).__name__})") from error
        return [Image.fromarray(frame).convert(self.mode) for frame in frames]


def _frames_of(folder: Path) -> list[Path]:
    """Frames of a clip in the order of their names, numbers by value."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in _FRAMES and not f.name.startswith(".")]
    return sorted(files, key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f.name)])


def clip_folder(root: Path, mode: str, num_frames: int, at_random: bool) -> tuple[ClipFiles, Counter[str]]:
    """A folder with one sub-folder of clips per class, and the suffixes of files that are not read.

    Raises:
        UserError: the folder is missing or empty, or a class has no clips (named).
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: --data-path must hold train/ and val/, one folder per class in each")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{root} is empty: it must hold one folder of clips per class")
    samples: list[tuple[Path, int]] = []
    unread: Counter[str] = Counter()
    for number, name in enumerate(classes):
        before = len(samples)
        for path in sorted(p for p in (root / name).iterdir() if not p.name.startswith(".")):
            if path.is_dir() or path.suffix.lower() in (*ANIMATIONS, *VIDEOS):
                samples.append((path, number))
            else:
                unread[path.suffix.lower() or "no ending"] += 1
        if len(samples) == before:
            raise UserError(
                f"class folder {root / name} has no clips: add folders of frames or files "
                f"({', '.join((*ANIMATIONS, *VIDEOS))}), or remove it"
            )
    return ClipFiles(samples, classes, mode, num_frames, at_random), unread


def clip_transform(is_train: bool, args: Augmentation) -> Callable[[list[Image.Image]], torch.Tensor]:
    """From frames to a normalised tensor (channels, frames, side, side); all frames are cropped and coloured alike.

    Training: random resized crop (at 32 pixels or less a padded random crop), flip, RandAugment with the magnitude and
    number of operations of `--aa`, or colour jitter without it, and random erasing. Evaluation as for images.

    Raises:
        UserError: an augmentation that works on single images only.
    """
    if not isinstance(args.input_size, int):
        raise UserError(f"--input-size of clips is one side, not {args.input_size}")
    size, (mean, std) = args.input_size, normalisation(args.in_chans)
    final = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    bicubic = transforms.InterpolationMode.BICUBIC
    if not is_train or not args.train_mode:
        steps: list[Any] = [v2.Resize(int(size / args.eval_crop_ratio), interpolation=bicubic), v2.CenterCrop(size)]
        return _ClipTransform([*steps, *final])
    if args.ThreeAugment:
        raise UserError("--ThreeAugment is for single images: use --aa rand-m5-n2 or none with clips")
    if size <= SMALL_IMAGE:
        steps = [v2.Resize(size, interpolation=bicubic), v2.RandomCrop(size, padding=4)]
    else:
        steps = [v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=bicubic)]
    steps.append(v2.RandomHorizontalFlip())
    if args.aa in (None, "", "none"):
        if args.color_jitter:
            steps.append(v2.ColorJitter(*[args.color_jitter] * 3))
    else:
        if not args.aa.startswith("rand"):
            raise UserError(f"--aa {args.aa} is for single images: use rand-m5-n2 or none with clips")
        magnitude, count = (re.search(rf"-{letter}(\d+)", args.aa) for letter in "mn")
        # timm's magnitudes go from 0 to 10, torchvision's from 0 to 30.
        steps.append(v2.RandAugment(int(count[1]) if count else 2, 3 * int(magnitude[1]) if magnitude else 27))
    erase = [v2.RandomErasing(p=args.reprob, scale=(0.02, 1 / 3))] if args.reprob else []
    return _ClipTransform([*steps, *final, *erase])


class _ClipTransform:
    """Steps of torchvision on the frames as one video."""

    def __init__(self, steps: list[Any]) -> None:
        self.steps = v2.Compose(steps)

    def __call__(self, frames: list[Image.Image]) -> torch.Tensor:
        pixels = torch.stack([v2.functional.pil_to_tensor(frame) for frame in frames])
        return self.steps(pixels).transpose(0, 1).contiguous()
