"""Which pixels speak for a class: integrated gradients (captum) and class activation maps (grad-cam).

Needs the extra `analysis`: pip install "vision-mamba[analysis]".
"""

import torch
from torch import nn

from vim.models.layout import split_tokens, to_map


def integrated_gradients(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, steps: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrated gradients (arXiv 1703.01365) from the normalised grey image 0.

    Args:
        model: classifier, left in evaluation mode.
        images: (B, C, H, W).
        targets: (B,) class numbers.
        steps: of the integral.

    Returns:
        Attributions (B, C, H, W), which add up to the difference of the logits of image and grey image; and by how much
        they miss that, (B,).

    Raises:
        ImportError: captum is not installed.
    """
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model.eval())
    found, missed = method.attribute(
        images, target=targets, n_steps=steps, internal_batch_size=max(len(images), 16), return_convergence_delta=True
    )
    return found.float(), missed.float()


def class_activation(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """Grad-CAM (arXiv 1610.02391) of what a block's mixer reads, (B, H, W) in [0, 1].

    The class token is taken out where it sits, and the patches go back to their places. The norm before the last mixer
    is the last place where patches still act on a class token.

    Raises:
        ImportError: grad-cam is not installed.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layout = model._layout(model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])), 1)

    def patches(tokens: torch.Tensor) -> torch.Tensor:
        return to_map(split_tokens(tokens, layout)[1], layout, False, model.patch_embed.column_major)

    block = model.eval().layers[layer]
    norm = block.norm1 if hasattr(block, "norm1") else block.norm
    with GradCAM(model, target_layers=[norm], reshape_transform=patches) as method:
        heat = method(images, targets=[ClassifierOutputTarget(int(k)) for k in targets])
    return torch.from_numpy(heat)
