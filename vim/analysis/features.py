"""What feature maps hold and see: effective receptive field, principal components, place of the class token."""

from collections.abc import Iterable

import torch
from torch import nn

from vim.models.layout import join_tokens, split_tokens
from vim.models.tokens import pool_tokens


def receptive_field(model: nn.Module, images: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """The effective receptive field of the middle of a feature map (arXiv 1701.04128), (H, W) with the sum 1.

    The gradient of the sum of the middle token's channels to the pixels: its absolute value, summed over colours and
    averaged over images.

    Args:
        model: a `VisionMamba`, left in evaluation mode.
        images: (B, C, H, W), tens of them for a smooth picture.
        layer: the block whose output it is; -1 for the last.

    Raises:
        ValueError: the gradient is zero or not finite everywhere, as of weights that are no use.
    """
    images = images.detach().requires_grad_()
    index = range(len(model.layers))[layer]
    (features,) = model.eval().forward_intermediates(images, indices=[index], intermediates_only=True)
    middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2].sum()
    (gradient,) = torch.autograd.grad(middle, images)
    field = gradient.abs().sum(1).mean(0)
    if not 0 < field.sum() < float("inf"):
        raise ValueError("the gradient to the pixels is zero or not finite: the model's weights are of no use")
    return field / field.sum()


def side_that_holds(field: torch.Tensor, share: float) -> float:
    """The side of the smallest square about the middle that holds this share of a field (H, W), over the image's."""
    rows, columns = field.shape
    for reach in range(max(rows, columns) // 2 + 1):
        top, left = max(rows // 2 - reach, 0), max(columns // 2 - reach, 0)
        if field[top : rows // 2 + reach + 1, left : columns // 2 + reach + 1].sum() >= share * field.sum():
            return min(1.0, (2 * reach + 1) / max(rows, columns))
    return 1.0


@torch.no_grad()
def component_maps(model: nn.Module, images: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """The first three principal components of a feature map as colours: (B, rows, columns, 3) in [0, 1].

    The components are those of all patches of all images, so that equal colours mean similar features across images.
    The sign of each is chosen so that its largest loading is positive.
    """
    index = range(len(model.layers))[layer]
    (features,) = model.eval().forward_intermediates(images, indices=[index], intermediates_only=True, norm=True)
    points = features.permute(0, 2, 3, 1).double()
    points = points - points.mean((0, 1, 2))
    flat = points.flatten(0, 2)
    axes = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    found = points @ axes
    low, high = found.flatten(0, 2).min(0).values, found.flatten(0, 2).max(0).values
    return ((found - low) / (high - low).clamp(min=1e-12)).float()


@torch.no_grad()
def logits_with_class_token_at(model: nn.Module, images: torch.Tensor, position: int) -> torch.Tensor:
    """Logits (B, K) with the one class token at another index of the sequence, its position embedding with it.

    Raises:
        ValueError: a model without exactly one class token, or an index that the sequence does not have.
    """
    model.eval()
    tokens, layout = model._embed(images)
    if len(layout.positions) != 1 or model.global_pool != "token":
        raise ValueError(f"one class token that is read out is needed, this model has {len(layout.positions)}")
    if not 0 <= position < tokens.shape[1]:
        raise ValueError(f"position is {position}, expected 0 to {tokens.shape[1] - 1}")
    special, patches = split_tokens(tokens, layout)
    layout = layout._replace(positions=[position])
    hidden, residual, _, layout = model._blocks(join_tokens(special, patches, layout), layout, [], False, model.depth)
    return model._classify(pool_tokens(model._final_norm(hidden, residual), layout, "token"))


def accuracy_by_position(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], positions: list[int]
) -> list[float]:
    """Top-1 in percent with the class token at each position, for a model that was trained with it in one.

    Args:
        model: a `VisionMamba` with one class token.
        batches: images (B, C, H, W) and class numbers (B,).
        positions: indices in the sequence.

    Raises:
        ValueError: there is no image, or see `logits_with_class_token_at`.
    """
    hits, count = [0] * len(positions), 0
    for images, targets in batches:
        count += len(targets)
        for k, position in enumerate(positions):
            hits[k] += int((logits_with_class_token_at(model, images, position).argmax(1) == targets).sum())
    if not count:
        raise ValueError("there is no image to measure on")
    return [100 * h / count for h in hits]
