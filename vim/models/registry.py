"""The registered models: sizes, published names and where their weights are."""

import re
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from vim.models.checkpoint import CheckpointError, extract_state_dict
from vim.models.pos_embed import resample_pos_embed
from vim.models.vision_mamba import VisionMamba

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


def _cfg(**kwargs: Any) -> dict[str, Any]:
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
    return _cfg(hf_hub_id=f"hustvl/{repository}", hf_hub_filename=filename)


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
        "vim_nano_patch4_32.untrained": _cfg(**_SMALL_IMAGE),
        "vim_nano_patch4_stride2_32.untrained": _cfg(**_SMALL_IMAGE),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionMamba) -> dict[str, torch.Tensor]:
    """Published and own checkpoints → this model's state dict: unwrapped, and resampled to the model's patch grid."""
    state_dict = extract_state_dict(state_dict)
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is not None and model.pos_embed is not None and pos_embed.shape != model.pos_embed.shape:
        state_dict["pos_embed"] = resample_pos_embed(
            pos_embed, model.patch_embed.grid_size, class_token=model.class_token
        )
    if model.rope is not None:
        # Rotary tables follow from the grid; those of the file may stand for another one.
        state_dict["rope.freqs_cos"], state_dict["rope.freqs_sin"] = model.rope.freqs_cos, model.rope.freqs_sin
    return state_dict


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionMamba:
    # timm's factory passes these to every model, set or not.
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        if kwargs.get(name, 0) is None:
            del kwargs[name]
    try:
        return build_model_with_cfg(
            VisionMamba,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": 4, "feature_cls": "getter"},
            **kwargs,
        )
    except (OSError, RuntimeError, ValueError) as error:
        network = re.search(r"offline|connect|resolve|timed? ?out|cached|proxy|HTTP", str(error), re.IGNORECASE)
        if not pretrained or not network:
            raise
        cfg = default_cfgs[variant].default
        raise CheckpointError(
            f"the weights of {variant} could not be downloaded: get {cfg.hf_hub_filename} from the Hugging Face "
            f"repository {cfg.hf_hub_id} on a machine with a network and pass "
            "pretrained_cfg_overlay=dict(file='/path/to/it'), or put it into the hub cache ($HF_HOME/hub)"
        ) from error


def _published(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> VisionMamba:
    return _create(variant, pretrained, **{**_PUBLISHED, **args, **kwargs})


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
