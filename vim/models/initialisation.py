"""Published initialisations."""

from typing import TYPE_CHECKING

import torch
from timm.layers import lecun_normal_, trunc_normal_
from torch import nn

if TYPE_CHECKING:
    from vim.models.vision_mamba import VisionMamba

SPECIAL_TOKENS = ("cls_token", "cls_token_head", "cls_token_tail")


@torch.no_grad()
def init_vim(model: "VisionMamba") -> None:
    """Vim's: truncated normal tokens and positions, LeCun normal patch filters, zero Linear biases but the step's."""
    # The fan is that of the filters as a matrix, three-dimensional ones included.
    lecun_normal_(model.patch_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.patch_embed.proj.bias)
    for name in ("pos_embed", "pos_embed_cls", "temporal_pos_embedding", *SPECIAL_TOKENS):
        if getattr(model, name, None) is not None:
            trunc_normal_(getattr(model, name), std=0.02)
    init_head(model.head)
    for layer in model.layers:
        for module in layer.modules():
            bias = module.bias if isinstance(module, nn.Linear) else None
            if bias is not None and not getattr(bias, "_no_reinit", False):
                nn.init.zeros_(bias)
        init_output(layer, model.depth)


@torch.no_grad()
def init_videomamba(model: "VisionMamba") -> None:
    """VideoMamba's: every Linear truncated normal with zero bias, the step's included; zero class token and times."""
    for name in ("temporal_pos_embedding", *SPECIAL_TOKENS):
        if getattr(model, name, None) is not None:
            nn.init.zeros_(getattr(model, name))
    if model.pos_embed is not None:
        trunc_normal_(model.pos_embed, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in model.layers:
        init_output(layer, model.depth)


@torch.no_grad()
def init_head(head: nn.Module) -> None:
    """Truncated normal weight, zero bias."""
    if isinstance(head, nn.Linear):
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


def init_output(layer: nn.Module, depth: int) -> None:
    """Output projections of the mixers: Kaiming uniform, divided by the square root of the depth."""
    nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=5**0.5)
    layer.mixer.out_proj.weight /= depth**0.5
