"""Floating-point operations of a model, the scan included.

Importing this module, which `import vim` does, tells torch's `FlopCounterMode` what the project's operators cost: it
then counts whole models, forward and backward. `FVCORE_HANDLES` tells fvcore. `flop_terms` is the same count as a table
of formulas.
"""

from collections.abc import Callable
from typing import Any

import torch
from mamba_ssm_vim import Mamba
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from vim.models.layers import Block
from vim.models.vision_mamba import VisionMamba


def scan_flops(batch: int, seqlen: int, dim: int, dstate: int) -> int:
    """Operations of one gated selective scan.

    Per state: dt A, exp, times h, dt u B, plus, C h, plus; per channel: dt u, bias, softplus, D u, plus, and the gate's
    sigmoid and two products. An exponential counts as one.
    """
    return batch * seqlen * dim * (7 * dstate + 8)


def conv_flops(batch: int, seqlen: int, dim: int, width: int) -> int:
    """Operations of one depthwise convolution with bias and SiLU: a product and a sum per tap, sigmoid and product."""
    return batch * seqlen * dim * (2 * width + 2)


# torch's formulas get shapes in place of the operator's tensors. A backward pass recomputes the forward values and
# then does about twice as much, as for a matrix product.


def _scan(u: Any, delta: Any, A: Any, *args: Any, **kwargs: Any) -> int:
    return scan_flops(*u, A[1])


def _scan_backward(dout: Any, dlast_state: Any, u: Any, delta: Any, A: Any, *args: Any, **kwargs: Any) -> int:
    return 3 * scan_flops(*u, A[1])


def _conv(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return conv_flops(*x, weight[1])


def _conv_backward(dout: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 3 * conv_flops(*x, weight[1])


for _name, _formula in (
    ("selective_scan", _scan), ("selective_scan_backward", _scan_backward),
    ("causal_conv1d", _conv), ("causal_conv1d_backward", _conv_backward),
):  # fmt: skip
    register_flop_formula(getattr(torch.ops.vision_mamba, _name))(_formula)


def _for_fvcore(formula: Callable[..., int]) -> Callable[[list, list], int]:
    """A formula as fvcore calls it, with the traced graph's values; it counts a multiply-add as one operation."""

    def handle(inputs: list, outputs: list) -> int:
        shapes = (value.type().sizes() if value.isCompleteTensor() else None for value in inputs)
        return formula(*shapes) // 2

    return handle


# For `fvcore.nn.FlopCountAnalysis(model, images).set_op_handle(**FVCORE_HANDLES)`.
FVCORE_HANDLES = {
    "vision_mamba::selective_scan": _for_fvcore(_scan),
    "vision_mamba::causal_conv1d": _for_fvcore(_conv),
    "vision_mamba::add_norm": None,  # norms are left out, as torch's counter leaves them out
}


@torch.no_grad()
def count_flops(model: VisionMamba, batch: int = 1) -> int:
    """Operations of a forward pass over images of the model's size, as torch's counter sees it.

    Args:
        model: on any device; its weights are used.
        batch: images.
    """
    weight = model.patch_embed.proj.weight
    images = torch.zeros(batch, *model.input_shape, device=weight.device, dtype=weight.dtype)
    training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(images)
    model.train(training)
    return counter.get_total_flops()


def flop_terms(model: VisionMamba) -> dict[str, int]:
    """Operations per image by part of the model; they add up to `count_flops(model)`.

    A multiply-add is two operations. Norms, residual sums and the position embedding, which torch's counter leaves out,
    are left out here too.

    Raises:
        ValueError: a model with more than Vim's parts, which `count_flops` alone counts.
    """
    parts = {type(layer) for layer in model.layers} | {type(layer.mixer) for layer in model.layers}
    if parts != {Block, Mamba} or model.num_frames or not isinstance(model.neck, nn.Identity):
        raise ValueError("flop_terms knows Vim's parts alone: use count_flops for this model")
    mixer, depth = model.layers[0].mixer, len(model.layers)
    patches, dim = model.patch_embed.num_patches, model.embed_dim
    tokens = patches + model.num_prefix_tokens
    inner, states, rank = mixer.d_inner, mixer.d_state, mixer.dt_rank
    area = model.patch_embed.patch_size[0] * model.patch_embed.patch_size[1]
    # "v1" scans one convolved input in both directions.
    scans = depth * (1 if mixer.bimamba_type == "none" else 2)
    per_direction = depth * (2 if mixer.bimamba_type == "v2" else 1)
    heads = tokens if model.global_pool in ("", "max") else 1
    return {
        "patch_embed": 2 * patches * dim * model.in_chans * area,
        "in_proj": depth * 2 * tokens * dim * 2 * inner,
        "conv1d": per_direction * conv_flops(1, tokens, inner, mixer.d_conv),
        "x_proj": per_direction * 2 * tokens * inner * (rank + 2 * states),
        "dt_proj": per_direction * 2 * tokens * rank * inner,
        "scan": scans * scan_flops(1, tokens, inner, states),
        "out_proj": depth * 2 * tokens * inner * dim,
        "head": heads * 2 * dim * model.num_classes,
    }
