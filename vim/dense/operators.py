"""mmcv's compiled operators, served by torchvision: what the published configs need, without compiling mmcv.

The Python part of mmcv (`mmcv-lite` on PyPI) holds every module of `mmcv.ops` but not the extension `mmcv._ext` that
these modules call. `serve` puts a module of that name in its place. It has the functions below, with the arguments and
the output tensors that mmcv's Python code expects; any other function of the extension raises a `UserError` that names
it when it is called, not when mmcv is imported.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

import torch
import torchvision
from torch import Tensor
from torchvision.ops import nms as torchvision_nms
from torchvision.ops import sigmoid_focal_loss

from vim.errors import UserError

COMPILE = "bash scripts/install_openmmlab.sh --compile"


def _computable(t: Tensor) -> Tensor:
    """torchvision's CPU kernels lack the 16-bit types; float32 holds all their values."""
    return t if t.dtype == torch.float64 else t.float()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box goes if its IoU with a kept box of higher score is above this.
        offset: 0 or 1; widths and heights are x2 - x1 + offset and y2 - y1 + offset.

    Returns:
        (K,) int64, indices of the kept boxes by falling score.
    """
    boxes = _computable(boxes)
    # Areas and overlaps use the difference of the corners alone, so moving one corner is the same as adding the offset.
    return torchvision_nms(boxes + boxes.new_tensor([0, 0, offset, offset]), _computable(scores), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of `input` (B, C, H, W) at `rois` (K, 5: image, x1, y1, x2, y2) into `output` (K, C, h, w)."""
    _average_only(pool_mode)
    size = aligned_height, aligned_width
    output.copy_(
        torch.ops.torchvision.roi_align(
            _computable(input), rois.to(_computable(input).dtype), spatial_scale, *size, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward`: `grad_output` (K, C, h, w) into `grad_input` (B, C, H, W)."""
    _average_only(pool_mode)
    grad, size = _computable(grad_output), (aligned_height, aligned_width)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad, rois.to(grad.dtype), spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def _average_only(pool_mode: int) -> None:
    if pool_mode != 1:
        raise UserError(f"RoIAlign with pool_mode='max' needs mmcv's compiled operators: take 'avg', or run {COMPILE}")


def _focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    classes = input.shape[1]
    positive = target[:, None] == torch.arange(classes, device=target.device)
    loss = sigmoid_focal_loss(input, positive.to(input.dtype), alpha, gamma)
    if weight.numel() == 0:
        return loss
    if target.numel() and int(target.max()) >= classes:
        raise ValueError(f"class weights were given for {classes} classes, but a target is {int(target.max())}")
    return loss * weight[target][:, None]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss of every logit of `input` (N, C) into `output` (N, C).

    Args:
        target: (N,) int64, class of each row; C means background, none of the classes.
        weight: (C,), factor of the rows of each class, or empty.
        gamma: exponent that plays down rows that are already right.
        alpha: weight of the true class; the others have 1 - alpha.
    """
    output.copy_(_focal_loss(_computable(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Derivative of every loss by its logit into `grad_input` (N, C)."""
    with torch.enable_grad():
        logits = _computable(input.detach()).requires_grad_()
        (grad,) = torch.autograd.grad(_focal_loss(logits, target, weight, gamma, alpha).sum(), logits)
    grad_input.copy_(grad)


def get_compiler_version() -> str:
    """What mmcv prints among the versions of its environment."""
    return f"none (operators of torchvision {torchvision.__version__})"


def get_compiling_cuda_version() -> str:
    """CUDA version that torch was built with, which torchvision's is too."""
    return torch.version.cuda or "not available"


SERVED = (
    nms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)


class _Extension(ModuleType):
    """Stands for `mmcv._ext`."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: object, **kwargs: object) -> NoReturn:
            served = "nms, batched_nms, RoIAlign and sigmoid_focal_loss"
            raise UserError(
                f"mmcv's operator {name} needs mmcv's compiled extension: this install serves {served} by torchvision; "
                f"run {COMPILE}"
            )

        return refuse


def serve() -> None:
    """Put the operators in the place of mmcv's extension if mmcv came without it. mmcv must be imported."""
    if "mmcv._ext" in sys.modules or importlib.util.find_spec("mmcv._ext") is not None:
        return
    extension = _Extension("mmcv._ext", __doc__)
    # Without a loader mmengine does not take mmcv's own SyncBatchNorm to be there.
    extension.__spec__ = ModuleSpec("mmcv._ext", loader=None)
    for function in SERVED:
        setattr(extension, function.__name__, function)
    sys.modules["mmcv._ext"] = sys.modules["mmcv"]._ext = extension
