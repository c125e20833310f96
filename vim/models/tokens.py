"""Token sequences: class tokens in and out, pooling, and the checks of an image, as plain functions of tensors.

They branch on shapes and flags, so torch.fx takes them as leaves (timm's `register_notrace_function`), and they keep to
the subset of Python that TorchScript compiles.
"""

import torch
from timm.models import register_notrace_function

from vim.models.layout import TokenLayout, join_tokens, special_positions, split_tokens, token_layout
from vim.models.pos_embed import resample_frames, resample_grid
from vim.models.rope import rotary_tables, rotate

# Names of poolings, timm's where it has one, and the published ones.
GLOBAL_POOLS = {
    "token": None, "avg": "mean", "max": "max", "last": "none", "": "all", "registers": None, "halves": None
}  # fmt: skip


def checked_pool(global_pool: str | None, default: str, class_token: str) -> str:
    """The given pooling, or the default.

    Raises:
        ValueError: there is no such pooling, or not the special tokens that it needs.
    """
    if global_pool is None:
        return default
    if not isinstance(global_pool, str) or global_pool not in GLOBAL_POOLS:
        raise ValueError(f"global_pool is {global_pool!r}, expected one of {', '.join(map(repr, GLOBAL_POOLS))}")
    if global_pool == "token" and class_token in ("none", "spread"):
        raise ValueError("global_pool='token' needs a class token: build the model with if_cls_token=True")
    if global_pool == "registers" and class_token != "spread":
        raise ValueError("global_pool='registers' needs registers: build the model with num_registers")
    if global_pool == "halves" and class_token != "middle":
        raise ValueError("global_pool='halves' needs a class token in the middle, between the halves")
    return global_pool


@register_notrace_function
def check_images(
    x: torch.Tensor, in_chans: int, img_size: tuple[int, int], num_frames: int, dynamic: bool
) -> torch.Tensor:
    """The images (B, C, H, W), or for a model of clips the clips (B, C, T, H, W), if the model takes them.

    Args:
        x: images or clips.
        in_chans: channels C of the model.
        img_size: (height, width) of the model.
        num_frames: frames T of the model; 0 for a model of images.
        dynamic: other sizes, and other numbers of frames, are welcome.

    Raises:
        ValueError: other dimensions, other channels, or another size.
    """
    shape = list(x.shape)
    height, width = shape[-2], shape[-1]
    if num_frames == 0:
        if len(shape) != 4 or shape[1] != in_chans:
            raise ValueError(f"expected images (batch, {in_chans}, height, width), got {shape}")
    else:
        if len(shape) != 5 or shape[1] != in_chans:
            raise ValueError(f"expected clips (batch, {in_chans}, frames, height, width), got {shape}")
        if not dynamic and shape[2] != num_frames:
            raise ValueError(
                f"expected clips of {num_frames} frames, got {shape[2]}: build the model with num_frames={shape[2]} or "
                "with dynamic_img_size=True"
            )
    if not dynamic and (height != img_size[0] or width != img_size[1]):
        raise ValueError(
            f"expected images of {img_size}, got {shape[-2:]}: call set_input_size(({height}, {width})) first, "
            "or build the model with dynamic_img_size=True"
        )
    return x


@register_notrace_function
def embed_tokens(
    patches: torch.Tensor,
    special: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    special_pos_embed: torch.Tensor | None,
    temporal_pos_embed: torch.Tensor | None,
    class_token: str,
    layout: TokenLayout,
    own_grid: tuple[int, int],
    antialias: bool,
) -> torch.Tensor:
    """Patch tokens (B, M, D) → the sequence (B, L, D) with special tokens and position embedding.

    Args:
        patches: patch tokens.
        special: class tokens or registers (1, K, D), or None.
        pos_embed: (1, T, D) of `own_grid`, one frame, or None.
        special_pos_embed: (1, K, D) of the special tokens; None if their rows are in `pos_embed`.
        temporal_pos_embed: (1, frames, D) added to the patches of each frame, or None.
        class_token: where the rows of class tokens in `pos_embed` are, see `special_positions`.
        layout: of the sequence.
        own_grid: rows and columns of `pos_embed`.
        antialias: see `resample_pos_embed`.
    """
    tokens = patches
    if special is not None:
        tokens = join_tokens(special.to(patches.dtype).expand(patches.shape[0], -1, -1), patches, layout)
    if pos_embed is None:
        return tokens
    if layout.grid[0] != own_grid[0] or layout.grid[1] != own_grid[1]:
        pos_embed = resample_grid(pos_embed, layout.grid, own_grid, class_token, class_token, antialias)
    if special_pos_embed is not None:
        pos_embed = join_tokens(special_pos_embed, pos_embed, layout)
    if temporal_pos_embed is not None:
        frame = token_layout(class_token, 0, layout.grid, 1)
        special_rows, patch_rows = split_tokens(pos_embed, frame)
        steps = resample_frames(temporal_pos_embed, layout.frames)
        patch_rows = (patch_rows.unsqueeze(1) + steps.unsqueeze(2)).flatten(1, 2)
        pos_embed = join_tokens(special_rows, patch_rows, layout)
    return tokens + pos_embed.to(tokens.dtype)


@register_notrace_function
def drop_tokens(tokens: torch.Tensor, dropped: torch.Tensor, layout: TokenLayout, class_token: str) -> torch.Tensor:
    """The sequence after dropout (B, L, D), with registers as they were before it."""
    if class_token != "spread":
        return dropped
    return join_tokens(split_tokens(tokens, layout)[0], split_tokens(dropped, layout)[1], layout)


@register_notrace_function
def place_class_token(layout: TokenLayout, at_random: bool) -> TokenLayout:
    """The layout, with its class token at a random index on request.

    Raises:
        ValueError: that is asked of a layout that does not have exactly one class token.
    """
    if not at_random:
        return layout
    if len(layout.positions) != 1:
        raise ValueError(
            f"if_random_cls_token_position needs a model with one class token, this one has {len(layout.positions)}"
        )
    patches = layout.frames * layout.grid[0] * layout.grid[1]
    return TokenLayout(layout.grid, layout.frames, [int(torch.randint(0, patches + 1, (1,), device="cpu").item())])


@register_notrace_function
def order_tokens(
    tokens: torch.Tensor, layout: TokenLayout, at_random: bool, fixed: bool
) -> tuple[torch.Tensor, TokenLayout]:
    """The sequence (B, L, D), shuffled on request, and the layout that says where its class tokens are now.

    Raises:
        ValueError: what follows depends on the order (`fixed`), so that it cannot be shuffled.
    """
    if not at_random:
        return tokens, layout
    if fixed:
        raise ValueError("if_random_token_rank cannot be used with if_rope: rotary tables follow the grid")
    order = torch.randperm(tokens.shape[1], device=tokens.device)
    # Pooling splits class tokens off in increasing order.
    positions = sorted([int(torch.nonzero(order == p).item()) for p in layout.positions])
    return tokens[:, order], TokenLayout(layout.grid, layout.frames, positions)


@register_notrace_function
def rotate_tokens(
    tokens: torch.Tensor,
    layout: TokenLayout,
    cos: torch.Tensor,
    sin: torch.Tensor,
    own_grid: tuple[int, int],
    pretrain_side: int,
) -> torch.Tensor:
    """Rotary embedding of the patch tokens in a sequence (B, L, D); class tokens stay as they are.

    Args:
        tokens: the sequence.
        layout: of the sequence.
        cos, sin: tables (M, D) of `own_grid`; those of another grid are made on the fly.
        own_grid: rows and columns of the tables.
        pretrain_side: see `rotary_tables`.
    """
    if layout.grid[0] != own_grid[0] or layout.grid[1] != own_grid[1]:
        own = rotary_tables(tokens.shape[2], layout.grid, pretrain_side, device=cos.device)
        cos, sin = own[0].to(cos), own[1].to(sin)
    class_tokens, patches = split_tokens(tokens, layout)
    return join_tokens(class_tokens, rotate(patches, cos, sin), layout)


@register_notrace_function
def pool_tokens(tokens: torch.Tensor, layout: TokenLayout, pool: str) -> torch.Tensor:
    """Sequence (B, L, D) → pooled features (B, D), or the sequence for the pools "" and "max", which act on logits.

    Args:
        tokens: the normalised sequence.
        layout: of the sequence.
        pool: "token" (the class token, the mean of two), "last", "avg" (over patches), "max" or ""; "registers", which
            gives them one by one (B, R, D); "halves", the mean of the means on either side of the class token.
    """
    if pool == "registers":
        return split_tokens(tokens, layout)[0]
    if pool == "halves":
        middle = layout.positions[0]
        return (tokens[:, :middle].mean(1) + tokens[:, middle + 1 :].mean(1)) / 2
    if pool == "token":
        if len(layout.positions) == 1:
            return tokens[:, layout.positions[0]]
        return torch.stack([tokens[:, p] for p in layout.positions]).mean(0)
    if pool == "last":
        return tokens[:, -1]
    if pool == "avg":
        return split_tokens(tokens, layout)[1].mean(1)
    return tokens


@register_notrace_function
def pool_features(tokens: torch.Tensor, layout: TokenLayout, class_token: str, pool: str) -> torch.Tensor:
    """`pool_tokens` of the sequence of an image of any size, its class tokens where the model puts them.

    Args:
        tokens: the normalised sequence.
        layout: of an image of the model's own size.
        class_token: where the model puts class tokens, see `special_positions`.
        pool: see `pool_tokens`.
    """
    count = len(layout.positions)
    positions = special_positions(class_token, count, tokens.shape[1] - count)
    return pool_tokens(tokens, TokenLayout(layout.grid, layout.frames, positions), pool)
