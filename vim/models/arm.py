"""Autoregressive pretraining of a Mamba encoder by predicting clusters of patches (ARM, arXiv 2406.07537).

Legend: B batch, M = 144 patches, S = 9 segments of K = 16 patches, T = (S - 1) * K = 128 tokens, D encoder width,
E decoder width, P values of a patch.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, lecun_normal_, to_2tuple, trunc_normal_
from torch import nn
from torch.utils.checkpoint import checkpoint

from vim.models.initialisation import init_output
from vim.models.layers import MlpBlock, SwiGLU
from vim.models.mixers import build_mixer
from vim.models.patch_embed import PatchEmbed

# Patches on a side of the image and of a segment, and segments on a side.
SIDE, SEGMENT_SIDE = 12, 4
SEGMENTS, SEGMENT = (SIDE // SEGMENT_SIDE) ** 2, SEGMENT_SIDE**2
TOKENS = (SEGMENTS - 1) * SEGMENT


def sincos_table(dim: int) -> torch.Tensor:
    """(1, M, dim): sines, then cosines, of the column in the first half of the channels, of the row in the second."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles = torch.outer(torch.arange(SIDE, dtype=torch.float64, device="cpu"), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(SIDE, SIDE, -1), axis[None].expand(SIDE, SIDE, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, SIDE**2, dim).float()


def by_segments(tokens: torch.Tensor) -> torch.Tensor:
    """(B, M, C) in raster order → (B, M, C) segment by segment, rows first among them and within each."""
    count = SIDE // SEGMENT_SIDE
    grid = tokens.unflatten(1, (count, SEGMENT_SIDE, count, SEGMENT_SIDE))
    return grid.transpose(2, 3).flatten(1, 4)


def segment_mask(device: torch.device | str | None = None) -> torch.Tensor:
    """(T, T), added to attention: queries of segment a see the latents of segments up to a, else -inf."""
    segments = torch.arange(TOKENS, device=device) // SEGMENT
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.float32, device=device)
    return mask.masked_fill(segments[:, None] < segments[None], float("-inf"))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to latents, heads of 64 channels."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(dim, dim, **factory), nn.Linear(dim, 2 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, queries: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """queries, latents (B, T, E) and mask (T, T) → (B, T, E)."""
        q = self.q(queries).unflatten(2, (-1, 64)).transpose(1, 2)
        k, v = self.kv(latents).unflatten(2, (2, -1, 64)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return self.proj(attended.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Cross-attention to one set of latents, then an MLP; no attention among queries."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5, **factory)
        self.attn2, self.mlp = CrossAttention(dim, **factory), Mlp(dim, 4 * dim, **factory)
        self.norm2_1, self.norm2_2, self.norm2 = norm(dim), norm(dim), norm(dim)

    def forward(self, queries: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """queries, latents (B, T, E) and mask (T, T) → (B, T, E)."""
        queries = queries + self.attn2(self.norm2_1(queries), self.norm2_2(latents), mask)
        return queries + self.mlp(self.norm2(queries))


class ArmPretraining(nn.Module):
    """The encoder, scanning forward only, with a decoder that predicts the pixels of the next cluster of patches.

    The image is cut into nine segments of 4 × 4 patches. The encoder reads the first eight; from its outputs at four
    depths the decoder predicts segments two to nine, each from those before it.

    Args:
        img_size: side in pixels, 12 patches: nine segments of 4 × 4.
        patch_size, stride: of the patches, equal.
        channels: colour channels.
        depth: 12 or 24 blocks.
        embed_dim: width D, a multiple of 4.
        dec_embed_dim: width E of the decoder, a multiple of 64.
        d_state: states per channel.
        ssm_cfg: further arguments of `Mamba`.
        bimamba_type: must be "none", forward only: a backward scan would see what is to be predicted.
        device, dtype: where and as what the parameters are made.

    Raises:
        ValueError: sizes that the architecture does not have.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 192,
        patch_size: int = 16,
        stride: int = 16,
        channels: int = 3,
        depth: int = 12,
        embed_dim: int = 768,
        dec_embed_dim: int = 512,
        d_state: int = 16,
        ssm_cfg: dict[str, Any] | None = None,
        bimamba_type: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, only in (
            ("img_size", to_2tuple(img_size), ((SIDE * patch_size,) * 2,)), ("stride", stride, (patch_size,)),
            ("depth", depth, (12, 24)), ("bimamba_type", bimamba_type, ("none",)),
        ):  # fmt: skip
            if (tuple(value) if isinstance(value, list) else value) not in only:
                expected = " or ".join(map(repr, only))
                raise ValueError(f"{name} of ARM's pretraining must be {expected}, got {value!r}")
        if dec_embed_dim % 64 or dec_embed_dim < 64 or embed_dim % 4 or embed_dim < 4:
            raise ValueError(
                f"ARM's dec_embed_dim must be a multiple of 64 and embed_dim of 4, got {dec_embed_dim} and {embed_dim}"
            )
        factory = {"device": device, "dtype": dtype}
        norm = partial(nn.LayerNorm, eps=1e-5, **factory)
        self.depth, self.embed_dim, self.grad_checkpointing = depth, embed_dim, False
        self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim, **factory)
        self.pos_embed = nn.Parameter(torch.zeros(1, SIDE**2, embed_dim, **factory), requires_grad=False)
        self.layers = nn.ModuleList(
            MlpBlock(
                build_mixer(embed_dim, layer_idx=i, **{**factory, "d_state": d_state, "expand": 1, **(ssm_cfg or {})}),
                (norm(embed_dim), norm(embed_dim)),
                SwiGLU(embed_dim, embed_dim * 8 // 3, **factory),
                0.0,
                residual_in_fp32=True,
            )
            for i in range(depth)
        )
        self.taps = [depth // 2 + depth // 6 * i for i in range(4)]
        for i in range(1, 5):
            self.register_module(f"norm_{i}", norm(embed_dim))
        self.enc2dec = nn.Linear(4 * embed_dim, 4 * dec_embed_dim, **factory)
        self.ar_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim, **factory))
        self.dec_pos_embed = nn.Parameter(torch.zeros(1, SIDE**2, dec_embed_dim, **factory), requires_grad=False)
        self.dec_block = nn.ModuleList(DecoderBlock(dec_embed_dim, **factory) for _ in range(4))
        self.ar_norm = norm(dec_embed_dim)
        self.ar_pred = nn.Linear(dec_embed_dim, channels * patch_size**2, **factory)
        self.register_buffer("mask", segment_mask(device))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As in Vim; the fixed tables are computed."""
        self.pos_embed.copy_(sincos_table(self.pos_embed.shape[2]))
        self.dec_pos_embed.copy_(sincos_table(self.dec_pos_embed.shape[2]))
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.ar_token, std=0.02)
        for module in self.modules():
            bias = module.bias if isinstance(module, nn.Linear) else None
            if bias is not None and not getattr(bias, "_no_reinit", False):
                nn.init.zeros_(bias)
        for layer in self.layers:
            init_output(layer, self.depth)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names left out of weight decay beyond one-dimensional parameters."""
        return {"pos_embed", "dec_pos_embed", "ar_token"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each encoder block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → latents (B, T, E, 4), one set for each block of the decoder.

        Raises:
            ValueError: images of another shape.
        """
        expected = (self.patch_embed.proj.in_channels, *self.patch_embed.img_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"ARM's pretraining takes images (batch, *{expected}), got {tuple(x.shape)}")
        hidden = by_segments(self.patch_embed(x) + self.pos_embed)[:, :TOKENS]
        residual: torch.Tensor | None = None
        outputs = []
        for i, layer in enumerate(self.layers, 1):
            if self.grad_checkpointing:
                hidden, residual = checkpoint(layer, hidden, residual, use_reentrant=False)
            else:
                hidden, residual = layer(hidden, residual)
            if i in self.taps:
                norm = getattr(self, f"norm_{self.taps.index(i) + 1}")
                outputs.append(norm((hidden + residual).to(hidden.dtype)))
        return self.enc2dec(torch.cat(outputs, dim=-1)).unflatten(2, (-1, 4))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, T, E, 4) → predicted patches (B, T, P) of the segments from the second on."""
        queries = by_segments(self.ar_token + self.dec_pos_embed)[:, SEGMENT:].expand(latents.shape[0], -1, -1)
        for block, latent in zip(self.dec_block, latents.unbind(-1), strict=True):
            queries = block(queries, latent, self.mask)
        return self.ar_pred(self.ar_norm(queries))

    def targets(self, x: torch.Tensor) -> torch.Tensor:
        """Images → pixels (B, T, P) of the segments from the second on, each patch with mean 0 and variance 1."""
        size = self.patch_embed.patch_size[0]
        patches = x.unflatten(3, (SIDE, size)).unflatten(2, (SIDE, size))  # (B, C, rows, y, columns, x)
        pixels = by_segments(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))[:, SEGMENT:]
        return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → squared errors (T,), means over batch and values; their mean is the loss."""
        prediction = self.decode(self.encode(x))
        return (prediction - self.targets(x).to(prediction.dtype)).square().mean((0, 2))
