"""Vision Mamba (arXiv 2401.09417) and what was built on it: a bidirectional state-space backbone over patches.

Legend: B batch, M patch tokens, L = M + special tokens (class tokens, registers), D model width.

The class compiles under torch.compile, torch.export and TorchScript, and torch.fx traces it; what branches on shapes or
flags lives in `tokens.py` and `layers.py`, which the tracer takes as leaves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mamba_ssm_vim import RMSNorm
from timm.layers import DropPath
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from vim.models.checkpoint import checkpoint_filter_fn
from vim.models.checks import check_arguments, checked_indices
from vim.models.contract import TimmContract
from vim.models.initialisation import init_videomamba, init_vim
from vim.models.layers import Block, FeatureMap, MlpBlock, SwiGLU, apply_norm, refuse_merged, residual_norm
from vim.models.layout import TokenLayout, special_positions, split_tokens, to_map, token_layout
from vim.models.merging import merge_tokens
from vim.models.mixers import build_mixer
from vim.models.patch_embed import PatchEmbed
from vim.models.rope import RotaryEmbedding2d
from vim.models.tokens import (
    GLOBAL_POOLS,
    check_images,
    checked_pool,
    drop_tokens,
    embed_tokens,
    order_tokens,
    place_class_token,
    pool_features,
    pool_tokens,
    rotate_tokens,
)

# timm looks for the filter in the module of the class.
__all__ = ["VisionMamba", "checkpoint_filter_fn"]


class VisionMamba(TimmContract):
    """Vision Mamba classifier and backbone. Arguments carry their published names and defaults.

    Args:
        img_size: side, or (height, width), in pixels.
        patch_size, stride: side of a patch and distance between patches, in pixels.
        depth: blocks.
        embed_dim: width D.
        d_state: states per channel.
        channels: colour channels of the input; `in_chans` is timm's name for it.
        num_classes: classes; 0 leaves the head out.
        ssm_cfg: further arguments of `Mamba`; its `d_state` goes before the one above.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block; block i uses linspace(0, rate, depth) shifted by one.
        norm_epsilon: of the norms.
        rms_norm: RMSNorm, else LayerNorm.
        fused_add_norm: accepted for the published signature; the residual add is always fused with the norm.
        residual_in_fp32: keep the residual stream in float32.
        pt_hw_seq_len: side of the grid of the rotary frequencies.
        if_bidirectional: blocks work in pairs, the second on the reversed sequence.
        final_pool_type: "mean", "max" (of logits), "none" (last token) or "all" (logits of every token); without a
            class token.
        if_abs_pos_embed: learnt position embedding.
        if_rope, if_rope_residual: rotary embedding of hidden states, and of the residual stream, before each block.
        bimamba_type, if_divide_out, init_layer_scale: see `Mamba`.
        if_cls_token: a class token, at the head; in the middle with `use_middle_cls_token`; at both ends with
            `use_double_cls_token`.
        num_registers: register tokens spread evenly over the patches, read out by the head (arXiv 2405.14858).
        register_reduce: the head reads each register through a projection to D / register_reduce channels.
        norm_after_ssm: LayerNorm between the scan and its gate, in the mixer "v2" (arXiv 2502.00594).
        scan_pool: the mixer "v2" scans one token per row of patches, their "mean" or "max" (arXiv 2502.00594); else
            "none".
        scan_pool_scale: factor of the means.
        scan_pool_alternate: blocks of odd index pool over rows in place of columns.
        column_major: patches in column order.
        pad_patches: pad images with zeros until the patches divide them.
        num_frames: frames of a clip (B, C, T, H, W), which the model then takes in place of images
            (arXiv 2403.06977); 0 for images.
        tubelet_size: frames of a patch.
        mlp_dim: hidden width of a SwiGLU behind every mixer (arXiv 2406.07537); 0 for none.
        head_drop_rate: dropout before the head.
        weight_init: "vim" or "videomamba", the published initialisations.
        pos_embed_antialias: antialias the position embedding when it is resampled.
        merge_ratio: share of the patches, at most a half, that is merged into similar ones after each of `merge_blocks`
            at inference; those are by default two, at a third and two thirds of the depth.
        dynamic_img_size: accept any image size the grid serves in `forward`, resampling the position embedding.
        in_chans, global_pool: channels, and "token", "avg", "max", "last" or "", by timm's names; "registers" or
            "halves", see `pool_tokens`.
        device, dtype: where and as what the parameters are made; A, D and the step's bias stay float32.

    The flags of the published signature do not exclude each other: `use_double_cls_token` goes before
    `use_middle_cls_token`, both are about a class token only (`if_cls_token`), `if_divide_out` about "v2" only, and
    with a class token `final_pool_type` is not asked.

    Raises:
        ValueError: arguments that cannot be combined, or values out of range, with the reason.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        ssm_cfg: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        pt_hw_seq_len: int = 14,
        if_bidirectional: bool = False,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = False,
        if_rope: bool = False,
        if_rope_residual: bool = False,
        bimamba_type: str = "none",
        if_cls_token: bool = False,
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = False,
        num_registers: int = 0,
        register_reduce: int = 1,
        norm_after_ssm: bool = False,
        scan_pool: str = "none",
        scan_pool_scale: float = 1.0,
        scan_pool_alternate: bool = True,
        column_major: bool = False,
        pad_patches: bool = False,
        num_frames: int = 0,
        tubelet_size: int = 1,
        mlp_dim: int = 0,
        head_drop_rate: float = 0.0,
        weight_init: str = "vim",
        pos_embed_antialias: bool = True,
        merge_ratio: float = 0.0,
        merge_blocks: list[int] | None = None,
        dynamic_img_size: bool = False,
        in_chans: int | None = None,
        global_pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = channels if in_chans is None else in_chans
        check_arguments(
            depth=depth, embed_dim=embed_dim, d_state=d_state, in_chans=channels, num_classes=num_classes,
            drop_rate=drop_rate, drop_path_rate=drop_path_rate, head_drop_rate=head_drop_rate,
            if_bidirectional=if_bidirectional, final_pool_type=final_pool_type, if_rope=if_rope,
            if_rope_residual=if_rope_residual, bimamba_type=bimamba_type, if_cls_token=if_cls_token,
            num_registers=num_registers, register_reduce=register_reduce, scan_pool=scan_pool, num_frames=num_frames,
            tubelet_size=tubelet_size, mlp_dim=mlp_dim, pad_patches=pad_patches, column_major=column_major,
            weight_init=weight_init, merge_ratio=merge_ratio, merge_blocks=merge_blocks, norm_epsilon=norm_epsilon,
            init_layer_scale=init_layer_scale, scan_pool_scale=scan_pool_scale, pt_hw_seq_len=pt_hw_seq_len,
            ssm_cfg=ssm_cfg, dtype=dtype,
        )  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        self.num_classes, self.drop_rate, self.depth = num_classes, drop_rate, depth
        self.embed_dim = self.num_features = embed_dim
        self.in_chans, self.num_frames, self.weight_init = channels, num_frames, weight_init
        self.if_bidirectional, self.if_rope_residual = if_bidirectional, if_rope_residual
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False
        self.rms_norm, self.residual_in_fp32 = rms_norm, residual_in_fp32
        self.merge_ratio = float(merge_ratio)
        self.merge_blocks = [depth // 3, 2 * depth // 3] if merge_blocks is None else list(merge_blocks)
        self.register_reduce, self.pos_embed_antialias = register_reduce, pos_embed_antialias
        norm_layer: Callable[..., nn.Module] = partial(
            RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory
        )

        # Special tokens, and the pooling that they suggest.
        default_pool = next(name for name, published in GLOBAL_POOLS.items() if published == final_pool_type)
        if num_registers:
            self.class_token, default_pool = "spread", "registers"
        elif if_cls_token:
            self.class_token, default_pool = "middle" if use_middle_cls_token else "head", "token"
            self.class_token = "double" if use_double_cls_token else self.class_token
        else:
            self.class_token = "none"
        # Registers have position embeddings of their own; class tokens have rows among those of the patches.
        self.class_rows = "none" if num_registers else self.class_token
        self.num_prefix_tokens = len(special_positions(self.class_token, num_registers, 0))
        self.global_pool = checked_pool(global_pool, default_pool, self.class_token)

        # Tokens and positions.
        self.patch_embed = PatchEmbed(
            img_size, patch_size, stride, channels, embed_dim, tubelet=tubelet_size if num_frames else 0,
            pad=pad_patches, column_major=column_major, **factory,
        )  # fmt: skip
        rows = self.patch_embed.num_patches + len(special_positions(self.class_rows, 0, 0))
        tokens = {
            "cls_token": num_registers or int(self.class_token in ("head", "middle")),
            "cls_token_head": int(self.class_token == "double"),
            "cls_token_tail": int(self.class_token == "double"),
            "pos_embed": rows * if_abs_pos_embed,
            "pos_embed_cls": num_registers * if_abs_pos_embed,
            "temporal_pos_embedding": num_frames // tubelet_size * if_abs_pos_embed,
        }
        for name, count in tokens.items():
            if count:
                self.register_parameter(name, nn.Parameter(torch.zeros(1, count, embed_dim, **factory)))
            elif not name.startswith("cls_token"):
                self.register_parameter(name, None)
        self.pos_drop = nn.Dropout(drop_rate)
        self.rope = RotaryEmbedding2d(embed_dim, self.patch_embed.grid_size, pt_hw_seq_len) if if_rope else None
        if self.rope is not None:
            self.rope.to(device)

        # Blocks.
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        blocks: list[nn.Module] = []
        for i in range(depth):
            mixer = build_mixer(
                embed_dim, layer_idx=i, bimamba_type=bimamba_type, if_divide_out=if_divide_out,
                init_layer_scale=init_layer_scale, norm_after_ssm=norm_after_ssm, scan_pool=scan_pool,
                scan_pool_scale=scan_pool_scale, scan_pool_alternate=scan_pool_alternate,
                **{**factory, "d_state": d_state, **(ssm_cfg or {})},
            )  # fmt: skip
            if mlp_dim:
                norms, mlp = (norm_layer(embed_dim), norm_layer(embed_dim)), SwiGLU(embed_dim, mlp_dim, **factory)
                blocks.append(MlpBlock(mixer, norms, mlp, rates[i], residual_in_fp32))
            else:
                blocks.append(Block(mixer, norm_layer(embed_dim), rates[i], residual_in_fp32))
        for block in blocks:
            block.map = FeatureMap(clip=num_frames > 0, column_major=column_major, merged=merge_ratio > 0.0)
        self.layers = nn.ModuleList(blocks)
        # A block with an MLP has dropped its output already.
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 and not mlp_dim else nn.Identity()
        self.norm_f = norm_layer(embed_dim)
        self.grid_bound = if_rope or (self.layers[0].follows_grid and (scan_pool != "none" or bimamba_type == "v3"))
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}.map", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]

        # Head.
        self.neck: nn.Module = nn.Identity()
        self.norm_neck: nn.Module = nn.Identity()
        if self.global_pool == "registers" and register_reduce > 1:
            norm_neck = nn.RMSNorm if rms_norm else nn.LayerNorm
            self.neck = nn.Linear(embed_dim, embed_dim // register_reduce, bias=False, **factory)
            self.norm_neck = norm_neck(embed_dim // register_reduce * num_registers, eps=norm_epsilon, **factory)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Published initialisation.

        Args:
            needs_reset: also what the parts initialised themselves when they were built, as after `to_empty`.
        """
        if needs_reset:
            for module in (*self.layers, self.norm_f, self.neck, self.norm_neck, self.patch_embed.proj):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            if self.rope is not None:
                self.rope.set_grid(self.patch_embed.grid_size)
        (init_videomamba if self.weight_init == "videomamba" else init_vim)(self)

    # Forward

    def _special_tokens(self) -> torch.Tensor | None:
        if hasattr(self, "cls_token_head"):
            return torch.cat([self.cls_token_head, self.cls_token_tail], dim=1)
        elif hasattr(self, "cls_token"):
            return self.cls_token
        else:
            return None

    def _embed(
        self, x: torch.Tensor, random_position: bool = False, random_rank: bool = False
    ) -> tuple[torch.Tensor, TokenLayout]:
        """Image or clip → tokens with special tokens and positions (B, L, D), and their layout."""
        x = check_images(x, self.in_chans, self.patch_embed.img_size, self.num_frames, self.dynamic_img_size)
        frames = x.shape[2] // self.patch_embed.tubelet if self.num_frames else 1
        layout = self._layout(self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1])), frames)
        layout = place_class_token(layout, random_position)
        tokens = embed_tokens(
            self.patch_embed(x), self._special_tokens(), self.pos_embed, self.pos_embed_cls,
            self.temporal_pos_embedding, self.class_rows, layout, self.patch_embed.grid_size, self.pos_embed_antialias,
        )  # fmt: skip
        tokens, layout = order_tokens(tokens, layout, random_rank, self.grid_bound)
        return drop_tokens(tokens, self.pos_drop(tokens), layout, self.class_token), layout

    def _layout(self, grid: tuple[int, int], frames: int) -> TokenLayout:
        return token_layout(self.class_token, self.num_prefix_tokens, grid, frames)

    def _rotate(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        if self.rope is not None:
            return rotate_tokens(
                tokens, layout, self.rope.freqs_cos, self.rope.freqs_sin, self.patch_embed.grid_size,
                self.rope.pretrain_side,
            )  # fmt: skip
        else:
            return tokens

    def _blocks(
        self, hidden: torch.Tensor, layout: TokenLayout, take: list[int], norm: bool, depth: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], TokenLayout]:
        """Run the first `depth` blocks: hidden, residual, for each index in `take` the stream after it, the layout."""
        residual: torch.Tensor | None = None
        streams: list[torch.Tensor] = []
        first_hidden, first_residual = hidden, residual
        sizes = torch.ones_like(hidden[:, :, :1], dtype=torch.float32)
        if torch.jit.is_scripting():
            layers = self.layers
        else:
            layers = list(self.layers)[:depth]  # a slice would be a new ModuleList, at a percent of a forward pass
        for i, layer in enumerate(layers):
            second = self.if_bidirectional and i % 2 == 1
            if second:
                # The pair's second block reads what the first one read, backwards.
                layer_hidden = first_hidden.flip(1)
                layer_residual = first_residual if first_residual is None else first_residual.flip(1)
            else:
                hidden = self._rotate(hidden, layout)
                if residual is not None and self.if_rope_residual:
                    residual = self._rotate(residual, layout)
                first_hidden, first_residual = hidden, residual
                layer_hidden, layer_residual = hidden, residual
            if self.grad_checkpointing and not torch.jit.is_scripting():
                new_hidden, new_residual = checkpoint(layer, layer_hidden, layer_residual, layout, use_reentrant=False)
            else:
                new_hidden, new_residual = layer(layer_hidden, layer_residual, layout)
            if second and residual is not None:
                hidden, residual = hidden + new_hidden.flip(1), residual + new_residual.flip(1)
            else:
                hidden, residual = new_hidden, new_residual
            if not torch.jit.is_scripting() and layer.map.wanted(hidden, second or not self.if_bidirectional):
                layer.map(hidden, residual, layout)
            if i in take:
                streams.append(self._final_norm(hidden, residual) if norm else residual + hidden)
            if self.merge_ratio > 0.0 and i in self.merge_blocks and residual is not None and not self.training:
                hidden, residual, sizes, layout = merge_tokens(hidden, residual, sizes, layout, self.merge_ratio)
        assert residual is not None
        return hidden, residual, streams, layout

    def _final_norm(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden = self.drop_path(hidden)
        if self.norm_f is None:
            return hidden + residual
        elif torch.jit.is_scripting():
            return residual_norm(
                hidden, residual, self.norm_f.weight, self.norm_f.bias, self.norm_f.eps, self.rms_norm,
                self.residual_in_fp32,
            )[0]  # fmt: skip
        else:
            return apply_norm(self.norm_f, hidden, residual, self.residual_in_fp32)[0]

    def _features(
        self, x: torch.Tensor, random_position: bool = False, random_rank: bool = False
    ) -> tuple[torch.Tensor, TokenLayout]:
        hidden, layout = self._embed(x, random_position, random_rank)
        take: list[int] = []
        hidden, residual, _, layout = self._blocks(hidden, layout, take, False, len(self.layers))
        return self._final_norm(hidden, residual), layout

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → normalised tokens (B, L, D), class tokens where they sit."""
        return self._features(x)[0]

    def _reduce(self, pooled: torch.Tensor) -> torch.Tensor:
        if self.global_pool == "registers":
            return self.norm_neck(self.neck(pooled).flatten(1))
        else:
            return pooled

    def _classify(self, pooled: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.head_drop(pooled))
        return logits.amax(1) if self.global_pool == "max" else logits

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of `forward_features` → logits (B, num_classes), or with `pre_logits` the pooled features (B, D).

        The pools "" and "max" act after the head, per token, so their features keep the token axis (B, L, D).
        """
        if self.merge_ratio > 0.0 and self.class_token == "spread":
            raise ValueError("only forward knows where merged registers are: call the model, or use merge_ratio=0")
        layout = self._layout(self.patch_embed.grid_size, 1)
        pooled = self._reduce(pool_features(x, layout, self.class_token, self.global_pool))
        return pooled if pre_logits else self._classify(pooled)

    def forward(
        self,
        x: torch.Tensor,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W) → logits (B, num_classes).

        Args:
            x: images.
            if_random_cls_token_position: put the class token at a random place (the paper's robustness probe).
            if_random_token_rank: shuffle the token sequence, class token included.

        Raises:
            ValueError: images that do not fit, or a probe that this model has no class token or order for.
        """
        tokens, layout = self._features(x, if_random_cls_token_position, if_random_token_rank)
        return self._classify(self._reduce(pool_tokens(tokens, layout, self.global_pool)))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Feature maps after chosen blocks: the residual stream with the block's output added.

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks if an int, all if None, else these.
            return_prefix_tokens: give pairs (map, class tokens (B, K, D)).
            norm: apply the final norm to each map.
            stop_early: do not run blocks after the last requested one.
            output_fmt: "NCHW" maps (B, D, rows, columns) or "NLC" tokens (B, M, D).
            intermediates_only: give the list alone.

        Returns:
            (final tokens (B, L, D), list of maps), or the list.

        Raises:
            ValueError: unknown `output_fmt`, or indices that the depth does not have.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is '{output_fmt}', expected 'NCHW' or 'NLC'")
        if torch.jit.is_scripting():
            take, last = feature_take_indices(len(self.layers), indices)
        else:
            take, last = checked_indices(len(self.layers), self.if_bidirectional, indices)
        hidden, layout = self._embed(x)
        depth = last + 1 if stop_early else len(self.layers)
        refuse_merged(self.merge_ratio > 0.0)
        hidden, residual, streams, _ = self._blocks(hidden, layout, take, norm, depth)
        maps: list[torch.Tensor] = []
        prefix: list[torch.Tensor] = []
        for stream in streams:
            class_tokens, patches = split_tokens(stream, layout)
            maps.append(
                to_map(patches, layout, self.num_frames > 0, self.patch_embed.column_major)
                if output_fmt == "NCHW"
                else patches
            )
            prefix.append(class_tokens)
        if not torch.jit.is_scripting() and return_prefix_tokens:
            # TorchScript knows no list whose elements change their type.
            maps = list(zip(maps, prefix, strict=True))
        if intermediates_only:
            return maps
        return self._final_norm(hidden, residual), maps
