"""The training loss: cross-entropy of hard, smoothed or mixed labels, binary cross-entropy, and distillation."""

import argparse

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def base_loss(args: argparse.Namespace, *, mixed: bool) -> nn.Module:
    """The loss of logits (B, K) against targets: (B, K) soft if `mixed` or with BCE, else (B,) class numbers."""
    if args.bce_loss:
        return nn.BCEWithLogitsLoss()
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """(1 - alpha) * base + alpha * teacher's term (section 3 of arXiv 2012.12877), on the one head that Vim has.

    Args:
        base: loss against the labels.
        teacher: frozen classifier of the same images and classes.
        kind: "soft" (KL divergence at temperature tau, times tau²) or "hard" (cross-entropy with its decision).
        alpha, tau: weight and temperature.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau
        # Kept out of the module's own parameters: it is neither trained nor saved.
        self._teacher = [teacher.eval().requires_grad_(False)]

    def forward(self, images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W), logits (B, K), targets as the base loss wants them → scalar."""
        with torch.no_grad():
            teacher_logits = self._teacher[0](images)
        if self.kind == "soft":
            term = F.kl_div(
                F.log_softmax(logits / self.tau, dim=1),
                F.log_softmax(teacher_logits / self.tau, dim=1),
                reduction="batchmean",
                log_target=True,
            ) * (self.tau**2)
        else:
            term = F.cross_entropy(logits, teacher_logits.argmax(1))
        return (1 - self.alpha) * self.base(logits, targets) + self.alpha * term
