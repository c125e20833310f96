"""Image transforms of training and evaluation, from timm's factory with the published choices."""

import argparse
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
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


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, also for no bits at all, which the published policy asks for now and then: a black image."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


def _mend_posterize(transform: Any) -> None:
    """Put `_posterize` in place of timm's in a policy: Pillow from 13 on refuses to keep no bits."""
    if isinstance(transform, auto_augment.RandAugment):
        operations = list(transform.ops)
    elif isinstance(transform, auto_augment.AutoAugment):
        operations = [operation for sub_policy in transform.policy for operation in sub_policy]
    elif isinstance(transform, auto_augment.AugMixAugment):
        operations = list(transform.ops)
    else:
        return
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


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
    if args.ThreeAugment:
        return three_augment(size, args.color_jitter, args.src, mean, std)
    transform = create_transform(
        input_size=(args.in_chans, size, size),
        is_training=True,
        color_jitter=args.color_jitter or None,
        auto_augment=None if args.aa in (None, "", "none") else args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=mean,
        std=std,
    )
    for step in transform.transforms:
        _mend_posterize(step)
    if size <= SMALL_IMAGE:
        transform.transforms[0] = transforms.Compose([transforms.Resize(size), transforms.RandomCrop(size, padding=4)])
    return transform
