"""Image transforms of training and evaluation, from timm's factory with the published choices."""

import argparse
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms

SMALL_IMAGE = 32


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet mean and deviation per channel; a grey image takes their averages."""
    if channels == 1:
        return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def three_augment(
    size: int, color_jitter: float, simple_crop: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> transforms.Compose:
    """DeiT III's augmentation (arXiv 2204.07118): one of grey scale, solarisation and blur, then colour jitter.

    Args:
        size: side of the crop in pixels.
        color_jitter: strength, 0 for none.
        simple_crop: resize and random crop (`--src`) rather than a random resized crop.
        mean, std: of the normalisation.
    """
    bicubic = transforms.InterpolationMode.BICUBIC
    if simple_crop:
        crop = [
            transforms.Resize(size, interpolation=bicubic),
            transforms.RandomCrop(size, padding=4, padding_mode="reflect"),
        ]
    else:
        crop = [transforms.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=bicubic)]
    choice = transforms.RandomChoice(
        [
            transforms.Grayscale(num_output_channels=len(mean)),
            transforms.RandomSolarize(threshold=128, p=1.0),
            transforms.GaussianBlur(kernel_size=5, sigma=(0.1, 2.0)),
        ]
    )
    jitter = [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
    final = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose([*crop, transforms.RandomHorizontalFlip(), choice, *jitter, *final])


def build_transform(is_train: bool, args: argparse.Namespace) -> Any:
    """The transform from a PIL image to a normalised tensor (channels, input_size, input_size).

    Evaluation: shorter side to int(size / crop ratio), bicubic, centre crop. Training: timm's random resized crop,
    flip, RandAugment and random erasing; at 32 pixels or less a padded random crop replaces the resized one.
    """
    size = args.input_size
    mean, std = normalisation(args.in_chans)
    if not is_train or not args.train_mode:
        bicubic = transforms.InterpolationMode.BICUBIC
        return transforms.Compose(
            [
                transforms.Resize(int(size / args.eval_crop_ratio), interpolation=bicubic),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )
    if args.three_augment:
        return three_augment(size, args.color_jitter, args.src, mean, std)
    transform = create_transform(
        input_size=(args.in_chans, size, size),
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa in (None, "", "none") else args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=mean,
        std=std,
    )
    if size <= SMALL_IMAGE:
        transform.transforms[0] = transforms.Compose([transforms.Resize(size), transforms.RandomCrop(size, padding=4)])
    return transform
