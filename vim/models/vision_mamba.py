"""Vision Mamba (arXiv 2401.09417): a bidirectional state-space backbone over image patches.

Legend: B batch, M patch tokens, L = M + class tokens, D model width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mamba_ssm_vim import Mamba, RMSNorm, add_norm
from timm.layers import DropPath, lecun_normal_, resample_patch_embed, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from vim.models.pos_embed import class_positions, insert_class_tokens, resample_pos_embed, split_class_tokens
from vim.models.rope import RotaryEmbedding2d, rotate

FINAL_POOL_TYPES = ("none", "mean", "max", "all")
_GLOBAL_POOLS = {"token": None, "avg": "mean", "max": "max", "last": "none", "": "all"}


class PatchEmbed(nn.Module):
    """Patch convolution with a stride of its own: (B, C, H, W) → tokens (B, M, D) in raster order."""

    def __init__(self, img_size: Any, patch_size: Any, stride: Any, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size, self.stride = to_2tuple(patch_size), to_2tuple(stride)
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.proj = nn.Conv2d(channels, embed_dim, self.patch_size, self.stride)

    @property
    def num_patches(self) -> int:
        """Patches of an image of the module's size."""
        return self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of an image.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        if len(img_size) != 2 or any(
            not isinstance(s, int) or s < p for s, p in zip(img_size, self.patch_size, strict=True)
        ):
            raise ValueError(
                f"img_size is {tuple(img_size)}: expected (height, width), each at least the patch size "
                f"{self.patch_size}"
            )
        rows, columns = ((s - p) // t + 1 for s, p, t in zip(img_size, self.patch_size, self.stride, strict=True))
        return rows, columns

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        """Pixels per token along each axis."""
        return max(self.stride) if as_scalar else self.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, M, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Residual add and norm, then the mixer; the residual stream is carried beside the hidden states."""

    def __init__(
        self, dim: int, mixer: Mamba, norm: nn.Module, drop_path: float, residual_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, norm
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.residual_dtype = residual_dtype

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (B, L, D) and residual (B, L, D) or None → the same pair after this block."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        hidden, residual = apply_add_norm(self.norm, hidden, residual, self.residual_dtype)
        return self.mixer(hidden), residual


def apply_add_norm(
    norm: nn.Module, hidden: torch.Tensor, residual: torch.Tensor | None, residual_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add hidden to the residual stream and normalise with an RMSNorm or LayerNorm module."""
    return add_norm(
        hidden, residual, norm.weight, norm.bias, eps=norm.eps, rms=isinstance(norm, RMSNorm),
        residual_dtype=residual_dtype,
    )  # fmt: skip


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

    Raises:
        ValueError: arguments that cannot be combined, with the reason.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
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
    ) -> None:
        super().__init__()
        if if_rope_residual and not if_rope:
            raise ValueError("if_rope_residual needs if_rope=True: there is no rotary table to turn the residual with")
        if if_rope and embed_dim % 4:
            raise ValueError(f"if_rope needs embed_dim to be a multiple of 4, got {embed_dim}")
        if if_bidirectional and depth % 2:
            raise ValueError(f"if_bidirectional pairs the blocks, so depth must be even, got {depth}")
        if if_bidirectional and bimamba_type != "none":
            raise ValueError(
                f"if_bidirectional already runs every second block backwards: use bimamba_type='none', "
                f"got {bimamba_type!r}"
            )
        if final_pool_type not in FINAL_POOL_TYPES:
            raise ValueError(f"final_pool_type is {final_pool_type!r}, expected one of {', '.join(FINAL_POOL_TYPES)}")
        channels = channels if in_chans is None else in_chans
        self.num_classes, self.drop_rate, self.depth = num_classes, drop_rate, depth
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.in_chans = channels
        self.if_bidirectional, self.if_rope_residual = if_bidirectional, if_rope_residual
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False
        self.residual_dtype = torch.float32 if residual_in_fp32 else None
        if not if_cls_token:
            self.class_token = "none"
        elif use_double_cls_token:
            self.class_token = "double"
        else:
            self.class_token = "middle" if use_middle_cls_token else "head"
        self.num_prefix_tokens = len(class_positions(self.class_token, 0))
        default_pool = next(k for k, v in _GLOBAL_POOLS.items() if v == final_pool_type)
        self.global_pool = self._checked_pool(global_pool, "token" if if_cls_token else default_pool)

        self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim)
        for name in {"none": [], "double": ["cls_token_head", "cls_token_tail"]}.get(self.class_token, ["cls_token"]):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim)) if if_abs_pos_embed else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.rope = RotaryEmbedding2d(embed_dim, self.patch_embed.grid_size, pt_hw_seq_len) if if_rope else None

        norm_layer: Callable[..., nn.Module] = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon)
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            Block(
                embed_dim,
                Mamba(
                    embed_dim,
                    d_state=d_state,
                    layer_idx=i,
                    bimamba_type=bimamba_type,
                    if_divide_out=if_divide_out,
                    init_layer_scale=init_layer_scale,
                    **(ssm_cfg or {}),
                ),
                norm_layer(embed_dim),
                rates[i],
                self.residual_dtype,
            )
            for i in range(depth)
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.norm_f = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.init_weights()

    def _checked_pool(self, global_pool: str | None, default: str) -> str:
        if global_pool is None:
            return default
        if global_pool not in _GLOBAL_POOLS:
            allowed = ", ".join(map(repr, _GLOBAL_POOLS))
            raise ValueError(f"global_pool is {global_pool!r}, expected one of {allowed}")
        if global_pool == "token" and self.class_token == "none":
            raise ValueError("global_pool='token' needs a class token: build the model with if_cls_token=True")
        return global_pool

    @torch.no_grad()
    def init_weights(self) -> None:
        """Published initialisation; the parameters that `Mamba` sets itself (A, D, dt_proj) stay as it made them."""
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
        """Replace the head by a new one, or by none for 0 classes, and optionally the pooling."""
        self.global_pool = self._checked_pool(global_pool, self.global_pool)
        self.num_classes = num_classes
        device, dtype = self.norm_f.weight.device, self.norm_f.weight.dtype
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype)
            with torch.no_grad():
                self._init_head()

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size, the patch size or both, resampling position embedding and patch filters.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        embed, old_grid = self.patch_embed, self.patch_embed.grid_size
        if patch_size is not None and to_2tuple(patch_size) != embed.patch_size:
            new = PatchEmbed(
                img_size or embed.img_size,
                patch_size,
                to_2tuple(patch_size) if embed.stride == embed.patch_size else embed.stride,
                self.in_chans,
                self.embed_dim,
            ).to(embed.proj.weight)
            new.proj.weight.data.copy_(resample_patch_embed(embed.proj.weight.data, list(new.patch_size)))
            new.proj.bias.data.copy_(embed.proj.bias.data)
            self.patch_embed = embed = new
        img_size = to_2tuple(img_size or embed.img_size)
        embed.grid_size, embed.img_size = embed.dynamic_feat_size(img_size), img_size
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

    def _class_tokens(self, batch: int) -> torch.Tensor:
        names = ["cls_token_head", "cls_token_tail"] if self.class_token == "double" else ["cls_token"]
        return torch.cat([getattr(self, name) for name in names], dim=1).expand(batch, -1, -1)

    def _embed(self, x: torch.Tensor, random_position: bool = False) -> tuple[torch.Tensor, tuple[int, int], list[int]]:
        """Image → tokens with class tokens and positions (B, L, D), the patch grid, the class tokens' indices."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (batch, {self.in_chans}, height, width), got {tuple(x.shape)}")
        img_size = (x.shape[2], x.shape[3])
        if not self.dynamic_img_size and img_size != self.patch_embed.img_size:
            raise ValueError(
                f"expected images of {self.patch_embed.img_size}, got {img_size}: call set_input_size{img_size} first, "
                "or build the model with dynamic_img_size=True"
            )
        grid = self.patch_embed.dynamic_feat_size(img_size)
        tokens = self.patch_embed(x)
        positions = class_positions(self.class_token, tokens.shape[1])
        if random_position and self.class_token in ("head", "middle"):
            positions = [int(torch.randint(0, tokens.shape[1] + 1, (1,)))]
        if positions:
            tokens = insert_class_tokens(tokens, self._class_tokens(x.shape[0]).to(tokens.dtype), positions)
        if self.pos_embed is not None:
            pos_embed = self.pos_embed
            if grid != self.patch_embed.grid_size:
                pos_embed = resample_pos_embed(
                    pos_embed, grid, class_token=self.class_token, old_grid=self.patch_embed.grid_size
                )
            tokens = tokens + pos_embed.to(tokens.dtype)
        return self.pos_drop(tokens), grid, positions

    def _rotate(self, tokens: torch.Tensor, grid: tuple[int, int], positions: list[int]) -> torch.Tensor:
        cos, sin = self.rope.tables(grid, self.patch_embed.grid_size)
        class_tokens, patches = split_class_tokens(tokens, positions)
        patches = rotate(patches, cos, sin)
        return insert_class_tokens(patches, class_tokens, positions) if positions else patches

    def _block(
        self, index: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint(self.layers[index], hidden, residual, use_reentrant=False)
        return self.layers[index](hidden, residual)

    def _blocks(
        self,
        hidden: torch.Tensor,
        grid: tuple[int, int],
        positions: list[int],
        *,
        depth: int | None = None,
        after_block: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the first `depth` blocks (all by default); `after_block(index, hidden, residual)` sees each result."""
        residual = None
        step = 2 if self.if_bidirectional else 1
        for i in range(0, len(self.layers) if depth is None else depth, step):
            if self.rope is not None:
                hidden = self._rotate(hidden, grid, positions)
                if residual is not None and self.if_rope_residual:
                    residual = self._rotate(residual, grid, positions)
            if self.if_bidirectional:
                forward_hidden, forward_residual = self._block(i, hidden, residual)
                back_hidden, back_residual = self._block(
                    i + 1, hidden.flip(1), None if residual is None else residual.flip(1)
                )
                hidden = forward_hidden + back_hidden.flip(1)
                residual = forward_residual + back_residual.flip(1)
            else:
                hidden, residual = self._block(i, hidden, residual)
            if after_block is not None:
                after_block(i + step - 1, hidden, residual)
        return hidden, residual

    def _final_norm(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if residual is not None:
            hidden = self.drop_path(hidden)
        return apply_add_norm(self.norm_f, hidden, residual, self.residual_dtype)[0]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → normalised tokens (B, L, D), class tokens where they sit."""
        hidden, grid, positions = self._embed(x)
        return self._final_norm(*self._blocks(hidden, grid, positions))

    def _pool_and_classify(self, tokens: torch.Tensor, positions: list[int], pre_logits: bool) -> torch.Tensor:
        if self.global_pool == "token":
            pooled = tokens[:, positions[0]] if len(positions) == 1 else tokens[:, positions].mean(1)
        elif self.global_pool == "last":
            pooled = tokens[:, -1]
        elif self.global_pool == "avg":
            pooled = split_class_tokens(tokens, positions)[1].mean(1)
        else:
            pooled = tokens
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        return logits.amax(1) if self.global_pool == "max" else logits

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of `forward_features` → logits (B, num_classes), or with `pre_logits` the pooled features (B, D).

        The pools "" and "max" act after the head, per token, so their features keep the token axis (B, L, D).
        """
        positions = class_positions(self.class_token, x.shape[1] - self.num_prefix_tokens)
        return self._pool_and_classify(x, positions, pre_logits)

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
        """
        hidden, grid, positions = self._embed(x, random_position=if_random_cls_token_position)
        if if_random_token_rank:
            if self.rope is not None:
                raise ValueError("if_random_token_rank cannot be used with if_rope: rotary tables follow the grid")
            order = torch.randperm(hidden.shape[1], device=hidden.device)
            hidden = hidden[:, order]
            positions = [int((order == p).nonzero()) for p in positions]
        tokens = self._final_norm(*self._blocks(hidden, grid, positions))
        if if_random_token_rank:
            # Pooling splits class tokens off in increasing order.
            positions = sorted(positions)
        return self._pool_and_classify(tokens, positions, pre_logits=False)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
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
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        take, last = self._take_indices(indices)
        if self.if_bidirectional and any(i % 2 == 0 for i in take):
            raise ValueError(f"blocks work in pairs (if_bidirectional), so indices must be odd, got {take}")
        hidden, grid, positions = self._embed(x)
        streams: list[torch.Tensor] = []

        def keep(index: int, hidden: torch.Tensor, residual: torch.Tensor) -> None:
            if index in take:
                streams.append(self._final_norm(hidden, residual) if norm else residual + hidden)

        hidden, residual = self._blocks(
            hidden, grid, positions, depth=last + 1 if stop_early else None, after_block=keep
        )
        maps = []
        for stream in streams:
            class_tokens, patches = split_class_tokens(stream, positions)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            maps.append((patches, class_tokens) if return_prefix_tokens else patches)
        return maps if intermediates_only else (self._final_norm(hidden, residual), maps)

    def _take_indices(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        depth = len(self.layers)
        if self.if_bidirectional and (indices is None or isinstance(indices, int)):
            odd = list(range(1, depth, 2))
            return (odd if indices is None else odd[-indices:]), depth - 1
        try:
            return feature_take_indices(depth, indices)
        except AssertionError as error:
            raise ValueError(f"indices is {indices!r}, but the model has blocks 0 to {depth - 1}") from error

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one in `indices`, and the norm and head if asked; gives the indices kept."""
        take, last = self._take_indices(indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0) if not prune_norm else setattr(self, "head", nn.Identity())
        return take
