"""The registered models: sizes, published names and where their weights are."""

import logging
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
    resolve_pretrained_cfg,
)

from vim.models.checkpoint import (
    CheckpointError,
    checkpoint_filter_fn,
    extract_state_dict,
    has_ema,
    load_checkpoint,
    stored_grid,
)
from vim.models.checks import checked_indices
from vim.models.layers import refuse_merged
from vim.models.layout import special_positions
from vim.models.vision_mamba import VisionMamba

_logger = logging.getLogger("vision_mamba")

# What all published models share (table 7 of arXiv 2401.09417 and the published entry points).
_PUBLISHED: dict[str, Any] = {
    "patch_size": 16,
    "depth": 24,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "final_pool_type": "mean",
    "if_abs_pos_embed": True,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_divide_out": True,
    "use_middle_cls_token": True,
}
_SUFFIX = "bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
_SUFFIX_BASE = "bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2"


def config(**kwargs: Any) -> dict[str, Any]:
    """timm's pretrained configuration, Vim's unless `kwargs` say otherwise."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


def _hub(repository: str, filename: str) -> dict[str, Any]:
    return config(hf_hub_id=f"hustvl/{repository}", hf_hub_filename=filename)


_SMALL_IMAGE = {"input_size": (3, 32, 32), "num_classes": 10, "crop_pct": 1.0, "license": "apache-2.0"}

_TAGGED = {
    "vim_tiny_patch16_224": (_SUFFIX, _hub("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth")),
    "vim_tiny_patch16_stride8_224": (_SUFFIX, _hub("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth")),
    "vim_small_patch16_224": (_SUFFIX, _hub("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth")),
    "vim_small_patch16_stride8_224": (_SUFFIX, _hub("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth")),
    "vim_base_patch16_224": (_SUFFIX_BASE, _hub("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth")),
}
default_cfgs = generate_default_cfgs(
    {
        **{f"{short}.midclstok_in1k": cfg for short, (_, cfg) in _TAGGED.items()},
        **{f"{short}_{suffix}.midclstok_in1k": cfg for short, (suffix, cfg) in _TAGGED.items()},
        "vim_nano_patch4_32.untrained": config(**_SMALL_IMAGE),
        "vim_nano_patch4_stride2_32.untrained": config(**_SMALL_IMAGE),
    }
)


def _pretrained_filter(state_dict: dict[str, Any], model: VisionMamba) -> dict[str, torch.Tensor]:
    """`checkpoint_filter_fn` with a notice where timm is about to drop the head without one."""
    grid, state_dict = stored_grid(state_dict), extract_state_dict(state_dict)
    pos_embed = state_dict.get("pos_embed")
    if grid is None and pos_embed is not None:
        # Of the image size that timm's configuration of the weights names, if that accounts for every row.
        rows, columns = model.patch_embed.dynamic_feat_size(model.pretrained_cfg["input_size"][-2:])
        grid = (
            (rows, columns)
            if rows * columns + len(special_positions(model.class_rows, 0, 0)) == pos_embed.shape[1]
            else None
        )
    state_dict = checkpoint_filter_fn(state_dict, model, grid=grid)
    head = state_dict.get("head.weight")
    if head is not None and model.num_classes not in (0, len(head)):
        _logger.warning(
            "the checkpoint's head has %d classes, the model %d: the head starts afresh", len(head), model.num_classes
        )
    return state_dict


def _weights_folder() -> Path:
    """Where published files may be put by hand: torch's own folder of downloaded checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _with_weights(variant: str, cfg: Any, overlay: dict[str, Any] | None, cache_dir: Any) -> dict[str, Any]:
    """The overlay of the pretrained configuration with the weights in it, read by this project's loader.

    So a file and a hub download end in the same weights, are read without running code whatever timm's version, and
    fail with one sentence. Sources that timm names itself (`hf-hub:`, `local-dir:`) are left to timm.
    """
    overlay = dict(overlay or {})
    cfg = resolve_pretrained_cfg(variant, cfg, overlay)
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir"):
        return overlay
    folder = _weights_folder() if cache_dir is None else Path(cache_dir)
    if cfg.file:
        source = str(cfg.file)
    elif cfg.url:
        source = str(folder / Path(cfg.url).name)
        if not Path(source).is_file():
            _download(cfg.url, Path(source))
    elif not cfg.hf_hub_id:
        raise CheckpointError(
            f"no file of published weights is known for {variant}: pass pretrained=False, or "
            "pretrained_cfg_overlay=dict(file='/path/to/weights.pth')"
        )
    elif not cfg.hf_hub_filename:
        return overlay
    elif (folder / cfg.hf_hub_filename).is_file():
        source = str(folder / cfg.hf_hub_filename)
    else:
        source = f"hf-hub:{cfg.hf_hub_id}/{cfg.hf_hub_filename}"
    try:
        checkpoint = load_checkpoint(source)
    except CheckpointError as error:
        if not source.startswith("hf-hub:"):
            raise
        raise CheckpointError(
            f"the weights of {variant} could not be downloaded ({type(error.__cause__).__name__}): get "
            f"{cfg.hf_hub_filename} from huggingface.co/{cfg.hf_hub_id} on a machine with a network and put it into "
            f"{folder}, or pass pretrained_cfg_overlay=dict(file='/path/to/{cfg.hf_hub_filename}')"
        ) from error
    # The authors' accuracies of these models are those of averaged weights.
    use_ema = variant.startswith(("vim_base", "fastvim")) and has_ema(checkpoint)
    state_dict = extract_state_dict(checkpoint, use_ema=use_ema)
    if "head.weight" in state_dict:
        overlay.setdefault("num_classes", len(state_dict["head.weight"]))
    return {**overlay, "file": None, "state_dict": {"model": state_dict, "grid": stored_grid(checkpoint)}}


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:
        raise CheckpointError(
            f"{url} could not be downloaded ({error}): get it on a machine with a network and put it into {path.parent}"
        ) from error


def _check_features(kwargs: dict[str, Any]) -> None:
    """Complete what timm's `features_only` takes, and refuse what it cannot do, before anything is built."""
    feature_cls, depth, pairs = (
        kwargs.get("feature_cls"),
        kwargs.get("depth", 24),
        kwargs.get("if_bidirectional", False),
    )
    if isinstance(feature_cls, str) and feature_cls.lower() not in ("getter", "hook", "fx"):
        raise ValueError(
            f"feature_cls is {feature_cls!r}, expected 'getter' (the default), 'hook' or 'fx': the blocks of these "
            "models are not a chain of modules that could be cut"
        )
    if not isinstance(depth, int) or depth < 1 or (pairs and depth % 2):
        return  # the model says so itself
    kwargs.setdefault("out_indices", min(4, depth // 2 if pairs else depth))
    out_indices, _ = checked_indices(depth, pairs, kwargs["out_indices"])
    if feature_cls not in (None, "getter"):
        # timm would read the blocks of a pair one by one.
        kwargs["out_indices"] = out_indices
        refuse_merged(bool(kwargs.get("merge_ratio")))


def create(variant: str, pretrained: bool, **kwargs: Any) -> VisionMamba:
    """timm's factory for a registered model of this project, with its own loading of weights."""
    # timm's factory passes these to every model, set or not.
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        if kwargs.get(name, 0) is None:
            del kwargs[name]
    if kwargs.get("features_only"):
        # Dense models take images of any size, and so do timm's own backbones that hold no table of positions.
        kwargs.setdefault("dynamic_img_size", True)
        _check_features(kwargs)
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = _with_weights(
            variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"), kwargs.get("cache_dir")
        )
    try:
        model = build_model_with_cfg(
            VisionMamba,
            variant,
            pretrained,
            pretrained_filter_fn=_pretrained_filter,
            feature_cfg={"feature_cls": "getter"},
            **kwargs,
        )
    except RuntimeError as error:
        if not pretrained or "state_dict" not in str(error):
            raise
        problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise CheckpointError(f"the weights do not fit this {variant}: {' '.join(problems)[:400]}") from error
    # The weights are in the model now; the configuration need not keep a second copy.
    (getattr(model, "pretrained_cfg", None) or {}).pop("state_dict", None)
    return model


def _published(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> VisionMamba:
    return create(variant, pretrained, **{**_PUBLISHED, **args, **kwargs})


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti at 224 × 224, 197 tokens: 7.1 M parameters, 76.1 % top-1 in the paper."""
    return _published("vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti with patches every 8 pixels, 730 tokens: 78.3 % top-1 in the paper."""
    return _published("vim_tiny_patch16_stride8_224", pretrained, {"embed_dim": 192, "stride": 8}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S at 224 × 224, 197 tokens: 25.8 M parameters, 80.5 % top-1 in the paper."""
    return _published("vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S with patches every 8 pixels, 730 tokens: 81.6 % top-1 in the paper."""
    return _published("vim_small_patch16_stride8_224", pretrained, {"embed_dim": 384, "stride": 8}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B at 224 × 224, 197 tokens: 97.6 M parameters, 81.9 % top-1 in the paper."""
    return _published("vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


_NANO: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "depth": 6, "embed_dim": 64, "drop_path_rate": 0.0, "num_classes": 10
}  # fmt: skip


@register_model
def vim_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """A small Vim for images of 28 to 32 pixels, 65 tokens; trains on a laptop's CPU."""
    return _published("vim_nano_patch4_32", pretrained, {**_NANO, "stride": 4}, kwargs)


@register_model
def vim_nano_patch4_stride2_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """`vim_nano_patch4_32` with patches every 2 pixels, 226 tokens: the finer granularity to fine-tune at."""
    return _published("vim_nano_patch4_stride2_32", pretrained, {**_NANO, "stride": 2}, kwargs)


def _published_name(short: str, suffix: str) -> None:
    """Register a model once more under its published name."""

    def entry_point(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
        return globals()[short](pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = f"{short}_{suffix}"
    entry_point.__module__ = __name__
    entry_point.__doc__ = f"Published name of `{short}`."
    globals()[entry_point.__name__] = register_model(entry_point)


for _short, (_suffix, _) in _TAGGED.items():
    _published_name(_short, _suffix)


def check_tag(name: str) -> None:
    """Refuse a registered model's name with weights behind a point that it has not.

    Raises:
        ValueError: see above; the message names those it has.
    """
    architecture, point, tag = name.partition(".")
    known = list(get_arch_pretrained_cfgs(architecture))
    if point and name not in known:
        has = f"has {', '.join(known)}" if known else "has no weights with a name"
        raise ValueError(f"there is no model {name}: {architecture} {has}; leave out .{tag}")
