"""Pretraining without labels (`--pretrain`): the model, its loss and its evaluation in place of a classifier's."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vim.data import LEFT_OUT
from vim.engine.distributed import DistributedContext, sum_over_ranks
from vim.engine.losses import Forward
from vim.engine.reporting import Reporter
from vim.engine.training import autocast
from vim.errors import UserError
from vim.flags import Flags, Model
from vim.models import VisionMamba
from vim.models.arm import ArmPretraining
from vim.models.masked import MaskedPretraining


def build_pretraining(classifier: nn.Module, args: Model) -> nn.Module:
    """The model that pretrains the encoder of a classifier.

    Args:
        classifier: built from `--model` and `--model-kwargs`; ARM's pretraining uses only its sizes.
        args: parsed flags.

    Raises:
        UserError: the classifier is of another architecture, or has unsuitable sizes.
    """
    if args.pretrain == "masked":
        if not isinstance(classifier, VisionMamba):
            raise UserError(f"--pretrain masked is for Vision Mamba models, and {args.model} is none: leave it out")
        try:
            return MaskedPretraining(classifier)
        except ValueError as error:
            raise UserError(f"--pretrain masked: {error}") from error
    if not isinstance(classifier, VisionMamba) or not hasattr(classifier.layers[0], "mlp"):
        raise UserError(
            f"--pretrain arm is for ARM's models, and {args.model} is none: use --model arm_base_patch16_224"
        )
    mixer = classifier.layers[0].mixer
    if mixer.expand != 1:
        raise UserError(f"--pretrain arm expects mixers of expand 1, and those of {args.model} have {mixer.expand}")
    try:
        return ArmPretraining(
            img_size=args.image_size, patch_size=classifier.patch_embed.patch_size[0],
            stride=classifier.patch_embed.stride[0], channels=args.in_chans, depth=len(classifier.layers),
            embed_dim=classifier.embed_dim, dec_embed_dim=args.decoder_dim, d_state=mixer.d_state,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"--pretrain arm: {error}") from error


class PretrainingCriterion:
    """The model's own loss, with the interface of `Criterion`; class numbers are not used."""

    def prepare(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as it is."""
        return images, targets

    def loss(self, forward: Forward, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch of images, a scalar."""
        return forward(images).mean()


@torch.no_grad()
def evaluate_pretraining(
    model: nn.Module,
    loader: Any,
    args: Flags,
    context: DistributedContext,
    reporter: Reporter,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The mean loss over the evaluation set.

    Args:
        model: its forward gives losses whose mean is the batch's.
        loader: this process's share of the set, batches of images and class numbers.
        args, context, reporter: of the run.
        stop_requested: asked between batches.

    Returns:
        The figures; None if a stop was requested in any process before the end.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    reporter.start("evaluate", len(loader))
    begun = time.perf_counter()
    for images, targets in loader:
        if stop_requested():
            sums[2] = 1
            break
        images = images[targets != LEFT_OUT].to(context.device, non_blocking=True)
        if len(images) == 0:
            continue
        with autocast(args, context):
            loss = model(images).mean().item()
        sums += torch.tensor([loss * len(images), len(images), 0], dtype=torch.float64)
        reporter.step(loss=loss, images=len(images) * context.world_size)
    reporter.finish()
    sums = sum_over_ranks(sums, context).cpu()
    if sums[2] > 0:
        return None
    images = int(sums[1])
    seconds = time.perf_counter() - begun
    return {
        "test_loss": (sums[0] / max(images, 1)).item(), "test_images": images, "test_images_per_s": images / seconds
    }  # fmt: skip
