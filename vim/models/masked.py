"""Masked pretraining: predict the pixels of hidden patches (SimMIM, arXiv 2111.09886; targets as in MAE, 2111.06377).

Legend: B batch, M patches, D model width, P values of a patch.
"""

import torch
from torch import nn

from vim.models.layout import split_tokens
from vim.models.vision_mamba import VisionMamba


class MaskedPretraining(nn.Module):
    """A classifier's encoder that sees images with most patches blank, and a linear prediction of what they hid.

    Every token stays in the sequence, so any mixer, registers and pooled scans work. The classifier keeps its head, but
    it is not trained; a checkpoint of this model fits it through `--finetune` as it is.

    Args:
        backbone: the classifier, with patches that do not overlap.
        mask_ratio: share of the patches that is blank.

    Raises:
        ValueError: patches that overlap, images that are padded, clips, column order, or a ratio outside (0, 1).
    """

    def __init__(self, backbone: VisionMamba, mask_ratio: float = 0.6) -> None:
        super().__init__()
        embed = backbone.patch_embed
        if embed.stride != embed.patch_size or embed.pad or embed.column_major or backbone.num_frames:
            raise ValueError("masked pretraining takes images in rows of patches that neither overlap nor are padded")
        if any(size % patch for size, patch in zip(embed.img_size, embed.patch_size, strict=True)):
            raise ValueError(
                f"masked pretraining needs whole patches of {embed.patch_size}, got {embed.img_size} pixels"
            )
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio!r}, expected a share between 0 and 1")
        self.backbone, self.mask_ratio = backbone, mask_ratio
        for part in (backbone.head, backbone.neck, backbone.norm_neck):
            part.requires_grad_(False)
        weight = embed.proj.weight
        self.predict = nn.Linear(weight.shape[0], weight[0].numel(), device=weight.device, dtype=weight.dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The backbone's."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        self.backbone.set_grad_checkpointing(enable)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → pixels (B, M, P), patches in raster order."""
        height, width = self.backbone.patch_embed.patch_size
        grid = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, rows, y, columns, x)
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M) boolean, True where blank; random in training, fixed in evaluation."""
        count = self.backbone.patch_embed.num_patches
        generator = None if self.training else torch.Generator(x.device).manual_seed(0)
        order = torch.rand(len(x), count, device=x.device, generator=generator).argsort(1)
        return order < round(count * self.mask_ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → squared errors (B, blank patches); their mean is the loss."""
        rows, columns = self.backbone.patch_embed.grid_size
        height, width = self.backbone.patch_embed.patch_size
        mask = self.mask(x)
        blank = mask.view(-1, 1, rows, columns).repeat_interleave(height, 2).repeat_interleave(width, 3)
        tokens = self.backbone.forward_features(x.masked_fill(blank, 0.0))
        prediction = self.predict(split_tokens(tokens, self.backbone.token_layout)[1])
        pixels = self.patches(x)
        # A patch of one colour has no shape to predict: the constant keeps its noise from being blown up.
        targets = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
        return (prediction - targets.to(prediction.dtype)).square().mean(-1)[mask].unflatten(0, (len(x), -1))
