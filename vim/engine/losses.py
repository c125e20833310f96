"""The training loss: hard, smoothed or mixed labels, binary cross-entropy, co-training of sub-models, distillation."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from vim.errors import UserError
from vim.flags import Flags

Forward = Callable[[torch.Tensor], torch.Tensor]


class TrainingLoss(Protocol):
    """The loss of a batch, in a part for the host and one for the device."""

    def prepare(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets as the loss takes them; random choices of the host are made in it."""

    def loss(self, forward: Forward, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of what `prepare` gave, a scalar; nothing in it waits for the device."""


def distillation_term(logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str, tau: float) -> torch.Tensor:
    """The teacher's part of the loss (section 3 of arXiv 2012.12877), on the one head that Vim has.

    Args:
        logits, teacher_logits: (B, K).
        kind: "soft", KL divergence at temperature `tau`, times tau²; or "hard", cross-entropy with its predicted class.
        tau: temperature.
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(1))
    student, teacher = (F.log_softmax(v / tau, dim=1) for v in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def cosub_loss(first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of two sub-models with the labels and with each other's prediction (arXiv 2212.04884).

    Args:
        first, second: logits (B, K) of two passes with other layers dropped.
        targets: (B, K) in [0, 1].
    """
    bce = F.binary_cross_entropy_with_logits
    labels = bce(first, targets) + bce(second, targets)
    agreement = bce(first, second.detach().sigmoid()) + bce(second, first.detach().sigmoid())
    return 0.25 * (labels + agreement)


class Criterion:
    """The training loss that the flags select.

    Args:
        args: parsed flags.
        num_classes: K.
        teacher: classifier of the same images and classes to distil from, which is frozen; None without distillation.

    Raises:
        UserError: flags that exclude each other.
    """

    def __init__(self, args: Flags, num_classes: int, teacher: nn.Module | None = None) -> None:
        self.args, self.num_classes = args, num_classes
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        if mixed and args.batch_size % 2:
            raise UserError(
                f"mixup and cutmix pair the images of a batch: --batch-size must be even, is {args.batch_size}"
            )
        if args.cosub and teacher is not None:
            raise UserError("--cosub and --distillation-type both teach by another model's output: pass one of them")
        if args.cosub and args.drop_path == 0 and args.drop == 0:
            raise UserError("--cosub trains sub-models that drop other layers: --drop-path or --drop must be above 0")
        self.mixup = None
        if mixed:
            self.mixup = Mixup(
                mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                # Smoothing would count every class as present in the binary loss.
                label_smoothing=0.0 if args.bce_loss or args.cosub else args.smoothing, num_classes=num_classes,
            )  # fmt: skip
        self._binary = args.bce_loss or args.cosub
        if self._binary:
            self._base: nn.Module = nn.BCEWithLogitsLoss()
        elif mixed:
            self._base = SoftTargetCrossEntropy()
        else:
            self._base = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()

    def __call__(self, forward: Forward, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of one batch, a scalar.

        Args:
            forward: the model, images (B, C, H, W) → logits (B, K).
            images: (B, C, H, W).
            targets: class numbers (B,).
        """
        return self.loss(forward, *self.prepare(images, targets))

    def prepare(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets as the loss takes them: mixed with chances that the host draws; targets (B,) or (B, K)."""
        if self.mixup is not None:
            # All frames of a clip are mixed in the same way, as channels are.
            mixed, targets = self.mixup(images.flatten(1, -3), targets)
            images = mixed.view_as(images)
        if self._binary:
            # As published, whatever is in the mixture counts as present.
            soft = F.one_hot(targets, self.num_classes) if targets.dim() == 1 else targets
            targets = soft.gt(0.0).float()
        return images, targets

    def loss(self, forward: Forward, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of what `prepare` gave; nothing in it waits for the device."""
        if self.args.cosub:
            first, second = self._clean(forward(torch.cat((images, images)))).chunk(2)
            return cosub_loss(first, second, targets)
        logits = self._clean(forward(images))
        loss = self._base(logits, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        alpha = self.args.distillation_alpha
        term = distillation_term(logits, teacher_logits, self.args.distillation_type, self.args.distillation_tau)
        return (1 - alpha) * loss + alpha * term

    def _clean(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.nan_to_num(logits) if self.args.if_nan2num else logits
