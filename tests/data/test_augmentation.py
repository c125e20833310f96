"""What flags do to images on their way to the model: transforms, mixtures, samplers and workers."""

import pytest
import torch
from nano import CONTEXT, parsed
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as tv

from vim.data import build_datasets, build_loaders, seed_all
from vim.data.transforms import build_transform
from vim.engine.build import build_criterion


def transform(*argv, train=True):
    built = build_transform(train, parsed("--input-size", 48, *argv))
    return {type(t): t for t in built.transforms}


def test_augmentation():
    steps = transform("--train-interpolation", "bilinear", "--reprob", 0.5, "--remode", "const", "--recount", 3)
    crop = next(t for kind, t in steps.items() if kind.__name__ == "RandomResizedCropAndInterpolation")
    assert crop.interpolation == tv.InterpolationMode.BILINEAR
    erasing = steps[RandomErasing]
    assert (erasing.probability, erasing.max_count) == (0.5, 3)
    assert not erasing.per_pixel
    assert not erasing.rand_color
    assert transform("--remode", "rand")[RandomErasing].rand_color
    assert transform()[RandomErasing].per_pixel
    assert RandomErasing not in transform("--reprob", 0)
    assert len(transform()[RandAugment].ops) == 15
    assert transform("--aa", "rand-m3-n4")[RandAugment].num_layers == 4
    assert AutoAugment in transform("--aa", "original")
    jitter = transform("--aa", "none", "--color-jitter", 0.2)[tv.ColorJitter]
    assert jitter.brightness == (0.8, 1.2)
    assert not {RandAugment, tv.ColorJitter} & set(transform("--aa", "none", "--color-jitter", 0))


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "original"])
def test_posterize_to_no_bits_is_black(policy):
    """At full magnitude the published policy keeps no bit of a colour, which newer versions of Pillow refuse."""
    found = 0
    for kind, step in transform("--aa", policy).items():
        if kind not in (RandAugment, AutoAugment):
            continue
        for op in step.ops if kind is RandAugment else [op for sub in step.policy for op in sub]:
            if "Posterize" in op.name:
                found += 1
                image = tv.ToPILImage()(torch.full((3, 4, 4), 0.9))
                assert not any(map(any, op.aug_fn(image, 0).getextrema()))
                assert op.aug_fn(image, 1).getextrema() == ((128, 128),) * 3
    assert found


def test_three_augment():
    steps = transform("--ThreeAugment", "--color-jitter", 0.4)
    choices = {type(t) for t in steps[tv.RandomChoice].transforms}
    assert choices == {tv.Grayscale, tv.RandomSolarize, tv.GaussianBlur}
    assert steps[tv.ColorJitter].contrast == (0.6, 1.4)
    assert tv.RandomResizedCrop in steps
    simple = transform("--ThreeAugment", "--src")
    assert tv.RandomCrop in simple
    assert tv.RandomResizedCrop not in simple
    seed_all(0)
    image = tv.ToPILImage()(torch.rand(3, 60, 70))
    assert build_transform(True, parsed("--ThreeAugment", "--src"))(image).shape == (3, 32, 32)


def test_small_images_get_a_padded_crop():
    built = build_transform(True, parsed("--input-size", 32)).transforms[0]
    assert [type(t) for t in built.transforms] == [tv.Resize, tv.RandomCrop]
    assert built.transforms[1].padding == 4


def test_evaluation_crop_and_train_mode():
    steps = transform("--eval-crop-ratio", 0.75, train=False)
    assert steps[tv.Resize].size == 64
    assert steps[tv.CenterCrop].size == (48, 48)
    assert set(transform("--no-train-mode")) == set(steps)


def test_mixup():
    flags = ("--mixup", 0.1, "--cutmix", 0.2, "--mixup-prob", 0.3, "--mixup-switch-prob", 0.4, "--mixup-mode", "elem")
    mix = build_criterion(parsed(*flags, "--smoothing", 0.15), CONTEXT, 10).mixup
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob, mix.mode, mix.label_smoothing) == (
        0.1, 0.2, 0.3, 0.4, "elem", 0.15,
    )  # fmt: skip
    ranged = build_criterion(parsed("--cutmix-minmax", 0.2, 0.8), CONTEXT, 10).mixup
    assert list(ranged.cutmix_minmax) == [0.2, 0.8]
    assert build_criterion(parsed("--mixup", 0, "--cutmix", 0), CONTEXT, 10).mixup is None


def test_repeated_augmentation():
    """Three copies of a third of the samples, in place of each sample once."""
    args = parsed("--batch-size", 16)
    train_set, eval_set, _ = build_datasets(args)
    for flags, copies in (((), 3), (("--no-repeated-aug",), 1)):
        loader, _ = build_loaders(parsed(*flags), train_set, eval_set, world_size=1, rank=0)
        indices = [index for _, _, index in loader.sampler]
        counts = torch.bincount(torch.tensor(indices), minlength=len(train_set))
        # The last sample of all may be cut short of its copies by the rounding to whole batches.
        assert (counts[counts > 0] == copies).sum() >= (counts > 0).sum() - 1


def test_workers_and_pinning(monkeypatch):
    monkeypatch.setattr("vim.data.loaders._cores", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train_set, eval_set, _ = build_datasets(parsed())
    for flags, workers, pinned in ((("--num_workers", 9), 4, True), (("--num_workers", 3, "--no-pin-mem"), 3, False)):
        loaders = build_loaders(parsed(*flags), train_set, eval_set, world_size=1, rank=0)
        for loader in (loaders[0].loader, loaders[1]):
            assert (loader.num_workers, loader.pin_memory) == (workers, pinned)


def test_seed():
    def first(seed):
        train_set, eval_set, _ = build_datasets(parsed())
        args = parsed("--seed", seed)
        loader, _ = build_loaders(args, train_set, eval_set, world_size=1, rank=0)
        return next(iter(loader))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
