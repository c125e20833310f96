"""Image transforms of training and evaluation, from timm's factory with the published choices."""

from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torchvision import transforms
from torchvision.transforms import functional

from vim.flags import Augmentation

SMALL_IMAGE = 32
_BICUBIC = transforms.InterpolationMode.BICUBIC


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet mean and deviation per channel; a grey image takes their averages."""
    if channels == 1:
        return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


class Cover:
    """Resize a PIL image, keeping its proportions, to the smallest size that covers a rectangle."""

    def __init__(self, size: tuple[int, int], interpolation: transforms.InterpolationMode) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        """The resized image."""
        height, width = self.size
        scale = max(height / image.height, width / image.width)
        sides = [max(height, round(scale * image.height)), max(width, round(scale * image.width))]
        return functional.resize(image, sides, interpolation=self.interpolation)


def _cover(size: tuple[int, int], interpolation: transforms.InterpolationMode = _BICUBIC) -> Any:
    """Resize so that a crop of this height and width fits; of a square, the shorter side becomes the square's."""
    height, width = size
    return transforms.Resize(height, interpolation) if height == width else Cover(size, interpolation)


def three_augment(
    size: tuple[int, int], color_jitter: float, simple_crop: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> transforms.Compose:
    """DeiT III's augmentation (arXiv 2204.07118): one of grey scale, solarisation and blur, then colour jitter.

    Args:
        size: height and width of the crop in pixels.
        color_jitter: strength, 0 for none.
        simple_crop: resize and random crop (`--src`) rather than a random resized crop.
        mean, std: of the normalisation.
    """
    if simple_crop:
        crop = [
            _cover(size),
            transforms.RandomCrop(size, padding=4, padding_mode="reflect"),
        ]
    else:
        crop = [transforms.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=_BICUBIC)]
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
    """timm's posterize, which also takes 0 bits, as the published policy sometimes does: a black image."""
    if bits_to_keep < 1:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep)


def _replace_posterize(transform: Any) -> None:
    """Replace timm's posterize in a policy by `_posterize`: Pillow 13 and later refuse 0 bits."""
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


def build_transform(is_train: bool, args: Augmentation) -> Any:
    """The transform from a PIL image to a normalised tensor (channels, height, width).

    Evaluation: shorter side to int(size / crop ratio), bicubic, centre crop; for a rectangle the image covers
    both sides divided by the ratio. Training: timm's random resized crop, flip, RandAugment and random erasing; at 32
    pixels or less a padded random crop replaces the resized one.
    """
    size = height, width = args.image_size
    mean, std = normalisation(args.in_chans)
    if not is_train or not args.train_mode:
        return transforms.Compose(
            [
                _cover((int(height / args.eval_crop_ratio), int(width / args.eval_crop_ratio))),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )
    if args.ThreeAugment:
        return three_augment(size, args.color_jitter, args.src, mean, std)
    transform = create_transform(
        input_size=(args.in_chans, *size),
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
        _replace_posterize(step)
    if max(size) <= SMALL_IMAGE:
        resize = _cover(size, transforms.InterpolationMode.BILINEAR)
        transform.transforms[0] = transforms.Compose([resize, transforms.RandomCrop(size, padding=4)])
    return transform
