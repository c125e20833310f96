"""Vision Mamba (arXiv 2401.09417): a bidirectional state-space backbone over image patches.

Legend: B batch, M patch tokens, L = M + class tokens, D model width.

The class compiles under torch.compile, torch.export and TorchScript, and torch.fx traces it; what branches on shapes or
flags lives in `tokens.py` and `layers.py`, which the tracer takes as leaves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mamba_ssm_vim import Mamba, RMSNorm
from timm.layers import DropPath, lecun_normal_, resample_patch_embed, trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from vim.models.checkpoint import checkpoint_filter_fn
from vim.models.layers import (
    Block,
    PatchEmbed,
    checked_indices,
    checked_size,
    residual_norm,
    update_model_input_size,
)
from vim.models.layout import TokenLayout, special_positions, split_tokens, to_map, token_layout
from vim.models.pos_embed import resample_pos_embed
from vim.models.rope import RotaryEmbedding2d
from vim.models.tokens import (
    GLOBAL_POOLS,
    check_images,
    checked_pool,
    embed_tokens,
    order_tokens,
    place_class_token,
    pool_features,
    pool_tokens,
    rotate_tokens,
)

# timm looks for the filter in the module of the class.
__all__ = ["VisionMamba", "checkpoint_filter_fn"]


class VisionMamba(nn.Module):
    """Vision Mamba classifier and backbone. Arguments carry their published names and defaults.

    Args:
        img_size: side, or (height, width), in pixels.
        patch_size, stride: side of a patch and distance between patches, in pixels.
        depth: blocks.
        embed_dim: width D.
        d_state: states per channel.
        channels: colour channels of the input; `in_chans` is timm's name for it.
        num_classes: classes; 0 leaves the head out.
        ssm_cfg: further arguments of `Mamba`.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block; block i uses linspace(0, rate, depth) shifted by one.
        norm_epsilon: of the norms.
        rms_norm: RMSNorm, else LayerNorm.
        fused_add_norm: accepted for the published signature; the residual add is always fused with the norm.
        residual_in_fp32: keep the residual stream in float32.
        pt_hw_seq_len: side of the grid that rotary frequencies stand for.
        if_bidirectional: blocks work in pairs, the second on the reversed sequence.
        final_pool_type: "mean", "max" (of logits), "none" (last token) or "all" (logits of every token); without a
            class token.
        if_abs_pos_embed: learnt position embedding.
        if_rope, if_rope_residual: rotary embedding of hidden states, and of the residual stream, before each block.
        bimamba_type, if_divide_out, init_layer_scale: see `Mamba`.
        if_cls_token: a class token, at the head; in the middle with `use_middle_cls_token`; at both ends with
            `use_double_cls_token`.
        dynamic_img_size: accept any image size the grid serves in `forward`, resampling the position embedding.
        in_chans, global_pool: timm's names: channels, and "token", "avg", "max", "last" or "".
        device, dtype: where and as what the parameters are made; A, D and the step's bias stay float32.

    The flags of the published signature do not exclude each other: `use_double_cls_token` goes before
    `use_middle_cls_token`, both are about a class token only (`if_cls_token`), `if_divide_out` about "v2" only, and
    with a class token `final_pool_type` is not asked.

    Raises:
        ValueError: arguments that cannot be combined, or values out of range, with the reason.
    """

    __jit_unused_properties__ = ("token_layout",)

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
        dynamic_img_size: bool = False,
        in_chans: int | None = None,
        global_pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = channels if in_chans is None else in_chans
        for name, value, least in (
            ("depth", depth, 1), ("embed_dim", embed_dim, 1), ("d_state", d_state, 1), ("in_chans", channels, 1),
            ("num_classes", num_classes, 0),
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} is {rate!r}, expected a probability below 1")
        if if_rope_residual and not if_rope:
            raise ValueError("if_rope_residual needs if_rope=True: there is no rotary table to turn the residual with")
        if if_rope and embed_dim % 4:
            raise ValueError(f"if_rope needs embed_dim to be a multiple of 4, got {embed_dim}")
        if if_bidirectional and depth % 2:
            raise ValueError(f"if_bidirectional pairs the blocks, so depth must be even, got {depth}")
        if if_bidirectional and bimamba_type not in ("none", None):
            raise ValueError(
                f"if_bidirectional already runs every second block backwards: use bimamba_type='none', "
                f"got {bimamba_type!r}"
            )
        pools = {published: timm_name for timm_name, published in GLOBAL_POOLS.items() if published}
        if final_pool_type not in pools:
            raise ValueError(f"final_pool_type is {final_pool_type!r}, expected one of {', '.join(pools)}")
        factory = {"device": device, "dtype": dtype}
        self.num_classes, self.drop_rate, self.depth = num_classes, drop_rate, depth
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.in_chans = channels
        self.if_bidirectional, self.if_rope_residual = if_bidirectional, if_rope_residual
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False
        self.rms_norm, self.residual_in_fp32 = rms_norm, residual_in_fp32
        if not if_cls_token:
            self.class_token = "none"
        elif use_double_cls_token:
            self.class_token = "double"
        else:
            self.class_token = "middle" if use_middle_cls_token else "head"
        self.num_prefix_tokens = len(special_positions(self.class_token, 0, 0))
        default_pool = "token" if if_cls_token else pools[final_pool_type]
        self.global_pool = checked_pool(global_pool, default_pool, self.class_token)

        self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim, **factory)
        for name in {"none": [], "double": ["cls_token_head", "cls_token_tail"]}.get(self.class_token, ["cls_token"]):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, embed_dim, **factory)))
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim, **factory)) if if_abs_pos_embed else None
        self.register_parameter("pos_embed", pos_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.rope = RotaryEmbedding2d(embed_dim, self.patch_embed.grid_size, pt_hw_seq_len) if if_rope else None
        if self.rope is not None:
            self.rope.to(device)

        norm_layer: Callable[..., nn.Module] = partial(
            RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory
        )
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            Block(
                Mamba(
                    embed_dim,
                    d_state=d_state,
                    layer_idx=i,
                    bimamba_type=bimamba_type,
                    if_divide_out=if_divide_out,
                    init_layer_scale=init_layer_scale,
                    **{**factory, **(ssm_cfg or {})},
                ),
                norm_layer(embed_dim),
                rates[i],
                residual_in_fp32,
            )
            for i in range(depth)
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.norm_f = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.init_weights(needs_reset=False)

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Published initialisation.

        Args:
            needs_reset: also what the parts initialised themselves when they were built, as after `to_empty`.
        """
        if needs_reset:
            for layer in self.layers:
                layer.reset_parameters()
            self.norm_f.reset_parameters()
            if self.rope is not None:
                self.rope.set_grid(self.patch_embed.grid_size)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name in ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail"):
            if getattr(self, name, None) is not None:
                trunc_normal_(getattr(self, name), std=0.02)
        self._init_head()
        for layer in self.layers:
            for module in layer.mixer.modules():
                bias = module.bias if isinstance(module, nn.Linear) else None
                if bias is not None and not getattr(bias, "_no_reinit", False):
                    nn.init.zeros_(bias)
            nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=5**0.5)
            layer.mixer.out_proj.weight /= self.depth**0.5

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    # timm's contract

    @property
    def token_layout(self) -> TokenLayout:
        """Where tokens stand for an image of the model's own size; its `grid` is that of the position embedding."""
        return self._layout(self.patch_embed.grid_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names left out of weight decay beyond one-dimensional parameters, as in the published runs."""
        return {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: stem, blocks, final norm."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^rope",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, or by none for 0 classes, and optionally the pooling.

        Raises:
            ValueError: a number of classes that is none, or an unknown pooling.
        """
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes is {num_classes!r}, expected a whole number of at least 0")
        self.global_pool = checked_pool(global_pool, self.global_pool, self.class_token)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            weight = self.patch_embed.proj.weight
            self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                self._init_head()
        self.head.train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size, the patch size or both, resampling position embedding and patch filters.

        With a new patch size the stride follows if it was the patch size, else it stays.

        Raises:
            ValueError: sizes that are none, or an image smaller than a patch.
        """
        embed, old_grid = self.patch_embed, self.patch_embed.grid_size
        patch_size = embed.patch_size if patch_size is None else checked_size("patch_size", patch_size)
        img_size = checked_size("img_size", embed.img_size if img_size is None else img_size, patch_size)
        if patch_size != embed.patch_size:
            weight = embed.proj.weight
            stride = patch_size if embed.stride == embed.patch_size else embed.stride
            new = PatchEmbed(
                img_size, patch_size, stride, self.in_chans, self.embed_dim, device=weight.device, dtype=weight.dtype
            )
            new.proj.weight.data.copy_(resample_patch_embed(weight.data, list(patch_size)))
            new.proj.bias.data.copy_(embed.proj.bias.data)
            new.requires_grad_(weight.requires_grad).train(embed.training)
            self.patch_embed = embed = new
            for info in self.feature_info:
                info["reduction"] = embed.feat_ratio()
        embed.grid_size, embed.img_size = embed.dynamic_feat_size(img_size), img_size
        if update_model_input_size is not None:
            update_model_input_size(self, img_size, patch_size=embed.patch_size, stride=embed.stride)
        if embed.grid_size == old_grid:
            return
        if self.pos_embed is not None:
            resampled = resample_pos_embed(
                self.pos_embed.data, embed.grid_size, class_token=self.class_token, old_grid=old_grid
            )
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.set_grid(embed.grid_size)

    # Forward

    def _class_tokens(self) -> torch.Tensor | None:
        if hasattr(self, "cls_token_head"):
            return torch.cat([self.cls_token_head, self.cls_token_tail], dim=1)
        elif hasattr(self, "cls_token"):
            return self.cls_token
        else:
            return None

    def _embed(
        self, x: torch.Tensor, random_position: bool = False, random_rank: bool = False
    ) -> tuple[torch.Tensor, TokenLayout]:
        """Image → tokens with class tokens and positions (B, L, D), and their layout."""
        x = check_images(x, self.in_chans, self.patch_embed.img_size, self.dynamic_img_size)
        layout = self._layout(self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3])))
        layout = place_class_token(layout, random_position)
        tokens = embed_tokens(
            self.patch_embed(x), self._class_tokens(), self.pos_embed, self.class_token, layout,
            self.patch_embed.grid_size,
        )  # fmt: skip
        tokens, layout = order_tokens(tokens, layout, random_rank, self.rope is not None)
        return self.pos_drop(tokens), layout

    def _layout(self, grid: tuple[int, int]) -> TokenLayout:
        return token_layout(self.class_token, self.num_prefix_tokens, grid, 1)

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
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Run the first `depth` blocks: hidden, residual and, for each index in `take`, the stream after that block."""
        residual: torch.Tensor | None = None
        streams: list[torch.Tensor] = []
        first_hidden, first_residual = hidden, residual
        if torch.jit.is_scripting():
            layers = self.layers
        else:
            layers = self.layers[:depth]
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
                new_hidden, new_residual = checkpoint(layer, layer_hidden, layer_residual, use_reentrant=False)
            else:
                new_hidden, new_residual = layer(layer_hidden, layer_residual)
            if second and residual is not None:
                hidden, residual = hidden + new_hidden.flip(1), residual + new_residual.flip(1)
            else:
                hidden, residual = new_hidden, new_residual
            if i in take:
                streams.append(self._final_norm(hidden, residual) if norm else residual + hidden)
        assert residual is not None
        return hidden, residual, streams

    def _final_norm(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden = self.drop_path(hidden)
        if self.norm_f is None:
            return hidden + residual
        else:
            return residual_norm(
                hidden, residual, self.norm_f.weight, self.norm_f.bias, self.norm_f.eps, self.rms_norm,
                self.residual_in_fp32,
            )[0]  # fmt: skip

    def _features(
        self, x: torch.Tensor, random_position: bool = False, random_rank: bool = False
    ) -> tuple[torch.Tensor, TokenLayout]:
        hidden, layout = self._embed(x, random_position, random_rank)
        take: list[int] = []
        hidden, residual, _ = self._blocks(hidden, layout, take, False, len(self.layers))
        return self._final_norm(hidden, residual), layout

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → normalised tokens (B, L, D), class tokens where they sit."""
        return self._features(x)[0]

    def _classify(self, pooled: torch.Tensor) -> torch.Tensor:
        logits = self.head(pooled)
        return logits.amax(1) if self.global_pool == "max" else logits

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of `forward_features` → logits (B, num_classes), or with `pre_logits` the pooled features (B, D).

        The pools "" and "max" act after the head, per token, so their features keep the token axis (B, L, D).
        """
        pooled = pool_features(x, self._layout(self.patch_embed.grid_size), self.class_token, self.global_pool)
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
        return self._classify(pool_tokens(tokens, layout, self.global_pool))

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
            stop_early: do not run blocks after the last one asked for.
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
        hidden, residual, streams = self._blocks(hidden, layout, take, norm, depth)
        maps: list[torch.Tensor] = []
        prefix: list[torch.Tensor] = []
        for stream in streams:
            class_tokens, patches = split_tokens(stream, layout)
            maps.append(to_map(patches, layout) if output_fmt == "NCHW" else patches)
            prefix.append(class_tokens)
        if not torch.jit.is_scripting() and return_prefix_tokens:
            # TorchScript knows no list whose elements change their type.
            maps = list(zip(maps, prefix, strict=True))
        if intermediates_only:
            return maps
        return self._final_norm(hidden, residual), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one in `indices`, and the norm and head if asked; gives the indices kept.

        Raises:
            ValueError: indices that the depth does not have.
        """
        take, last = checked_indices(len(self.layers), self.if_bidirectional, indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = None
        if prune_head:
            self.reset_classifier(0)
        return take
