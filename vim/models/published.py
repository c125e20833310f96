"""Models under their authors' names and constructor arguments: Vim and what was built on it.

The architectures: Vim (arXiv 2401.09417), Mamba-R (2405.14858), FastVim and Vim with LayerNorm (2502.00594), VideoMamba
(2403.06977), ARM (2406.07537).
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from vim.models.arm import ArmPretraining
from vim.models.vision_mamba import VisionMamba

# Defaults that the constructors share; those of the registered sizes have these three besides.
_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 16, "depth": 24, "embed_dim": 192, "channels": 3, "num_classes": 1000,
    "ssm_cfg": None, "drop_rate": 0.0, "drop_path_rate": 0.1, "norm_epsilon": 1e-5, "rms_norm": False,
    "fused_add_norm": False, "residual_in_fp32": False,
}  # fmt: skip
_FUSED: dict[str, Any] = {"rms_norm": True, "fused_add_norm": True, "residual_in_fp32": True}
# The authors resample position embeddings without antialiasing.
_PLAIN: dict[str, Any] = {"pos_embed_antialias": False}
_V2: dict[str, Any] = {"bimamba_type": "v2", "if_divide_out": True}


def _mambar(num_cls_tokens: int, cls_reduce: int, **args: Any) -> dict[str, Any]:
    if num_cls_tokens < 1:
        raise ValueError("Mamba-R reads its registers out: num_cls_tokens must be at least 1")
    return dict(
        **args, **_V2, **_PLAIN, stride=args["patch_size"], if_abs_pos_embed=True, num_registers=num_cls_tokens,
        register_reduce=cls_reduce,
    )  # fmt: skip


def _fastvim(
    stride: Any, scanpath_type: str, use_norm_after_ssm: bool, rotate_every_block: bool, collapse_method: str,
    scaling_factor: float, **args: Any,
) -> dict[str, Any]:  # fmt: skip
    # The published model takes `stride` and does not use it.
    if scanpath_type not in ("rowwise", "colwise"):
        raise ValueError(f"scanpath_type is {scanpath_type!r}, expected 'rowwise' or 'colwise'")
    return dict(
        **args, **_V2, stride=args["patch_size"], pad_patches=True, column_major=scanpath_type == "colwise",
        norm_after_ssm=use_norm_after_ssm, scan_pool=collapse_method, scan_pool_scale=scaling_factor,
        scan_pool_alternate=rotate_every_block,
    )  # fmt: skip


def _vim_layernorm(use_norm_after_ssm: bool, **args: Any) -> dict[str, Any]:
    for name in ("scanpath_type", "rotate_every_block", "collapse_method", "scaling_factor"):
        args.pop(name, None)
    return dict(**args, **_V2, norm_after_ssm=use_norm_after_ssm)


def _videomamba(bimamba: bool, **args: Any) -> dict[str, Any]:
    for name in ("use_checkpoint", "checkpoint_num"):  # memory of the authors' training; see set_grad_checkpointing
        args.pop(name, None)
    if args.get("num_frames") or "kernel_size" in args or "fc_drop_rate" in args:
        args["tubelet_size"], args["head_drop_rate"] = args.pop("kernel_size", 1), args.pop("fc_drop_rate", 0.0)
        args = {"num_frames": 8, **args, "stride": args["patch_size"]}
    return dict(
        **{"stride": 16, **_PLAIN, **args}, bimamba_type="v2" if bimamba else "none", if_cls_token=True,
        if_abs_pos_embed=True,
        weight_init="videomamba",
    )  # fmt: skip


def _arm(args: dict[str, Any]) -> dict[str, Any]:
    """What both models of ARM share: always LayerNorm, and mixers as wide as the model."""
    args |= {"rms_norm": False, "norm_epsilon": 1e-5, "ssm_cfg": {"expand": 1, **(args["ssm_cfg"] or {})}}
    if args.get("bimamba_type") == "v2":
        raise ValueError(
            "ARM's bimamba_type 'v2' scans forward only, with parameters that nothing uses: give 'none' or 'v3'"
        )
    if args.get("bimamba_type") not in ("v1", "v3"):
        args["bimamba_type"] = "none"
    return args


def _arm_finetune(global_pool: bool, if_devide_out: bool, **args: Any) -> dict[str, Any]:
    args = _arm(args)
    for name in ("if_cls_token", "use_middle_cls_token"):
        if not args.pop(name):
            raise ValueError(f"ARM always has a class token in the middle: {name} must be True")
    return dict(
        **args, **_PLAIN, if_divide_out=if_devide_out, if_cls_token=True, use_middle_cls_token=True,
        mlp_dim=args["embed_dim"] * 8 // 3, global_pool="halves" if global_pool else "token",
    )  # fmt: skip


def _arm_pretrain(**args: Any) -> dict[str, Any]:
    args = _arm(args)
    for name in ("rms_norm", "fused_add_norm", "residual_in_fp32", "num_classes", "drop_rate", "drop_path_rate",
                 "final_pool_type", "if_cls_token", "norm_epsilon"):  # fmt: skip
        args.pop(name, None)
    if not args.pop("if_abs_pos_embed"):
        raise ValueError("ARM's pretraining has fixed sine-cosine positions: if_abs_pos_embed must be True")
    return args


_FASTVIM: dict[str, Any] = {
    **_DEFAULTS, "stride": 16, "rms_norm": True, "final_pool_type": "none", "if_abs_pos_embed": True,
    "init_layer_scale": None, "scanpath_type": "rowwise", "use_norm_after_ssm": True, "rotate_every_block": True,
    "collapse_method": "mean", "scaling_factor": 1.0,
}  # fmt: skip
_ARM: dict[str, Any] = {**_DEFAULTS, "stride": 16, "if_abs_pos_embed": False, "bimamba_type": "none"}
# Arguments of the published classes with their defaults, and what builds the model from them.
_ARCHITECTURES: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "vim": (dict, {}),
    "mambar": (_mambar, {**_DEFAULTS, "num_cls_tokens": 1, "cls_reduce": 1}),
    "fastvim": (_fastvim, _FASTVIM),
    "vim_layernorm": (_vim_layernorm, {**_FASTVIM, "if_cls_token": True, "use_middle_cls_token": True}),
    "videomamba": (_videomamba, {**_DEFAULTS, **_FUSED, "bimamba": True}),
    "arm_finetune": (
        _arm_finetune,
        {
            **_ARM, "final_pool_type": "none", "if_cls_token": False, "if_devide_out": False,
            "use_middle_cls_token": False, "global_pool": False, "init_layer_scale": None,
        },
    ),
    "arm_pretrain": (_arm_pretrain, {**_ARM, "img_size": 192, "dec_embed_dim": 512, "bimamba_type": "None"}),
}  # fmt: skip
# Further arguments that have no default of their own: they choose between a class of images and one of clips.
_FURTHER = {
    "videomamba": ("stride", "kernel_size", "num_frames", "fc_drop_rate", "use_checkpoint", "checkpoint_num"),
    "arm_finetune": ("dec_embed_dim",),
    "arm_pretrain": ("final_pool_type", "if_cls_token"),
}
_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}
_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "mambar": {
        size: {"embed_dim": _WIDTHS[size], "depth": depth, "num_cls_tokens": registers, "cls_reduce": reduce}
        for size, depth, registers, reduce in (
            ("tiny", 24, 12, 1), ("small", 24, 12, 2), ("base", 24, 12, 4), ("large", 48, 16, 8)
        )
    },
    "fastvim": {
        size: {"embed_dim": width, "depth": {"large": 48, "huge": 64}.get(size, 24), "final_pool_type": "mean",
               "patch_size": 14 if size == "huge" else 16}
        for size, width in _WIDTHS.items()
    },
    "vim_layernorm": {size: {"embed_dim": width, "final_pool_type": "mean"} for size, width in _WIDTHS.items()},
    "videomamba": {
        "tiny": {}, "small": {"embed_dim": 384}, "middle": {"embed_dim": 576, "depth": 32}, "base": {"embed_dim": 768}
    },
    "arm_finetune": {
        size: {
            "embed_dim": width, "depth": depth, "if_abs_pos_embed": True, "bimamba_type": "v3", "if_cls_token": True,
            "if_devide_out": True, "use_middle_cls_token": True, "final_pool_type": "mean",
        }
        for size, width, depth in (("base", 768, 12), ("large", 1024, 24), ("huge", 1536, 24))
    },
    "arm_pretrain": {
        size: {"embed_dim": width, "depth": depth, "if_abs_pos_embed": True}
        for size, width, depth in (("base", 768, 12), ("large", 1024, 24), ("huge", 1536, 24))
    },
}  # fmt: skip
_CONSTRUCTORS = (
    ("mambar", r"mambar_(\w+)_patch16_224"),
    ("fastvim", r"fastvim\.vim_(\w+?)_patch1[46]_224_.*noclstok.*"),
    ("vim_layernorm", r"vim\.vim_(\w+?)_patch16_224_.*midclstok.*"),
    ("videomamba", r"(?:image|video)\.videomamba_(\w+)"),
    ("arm_finetune", r"(?:finetune\.)?arm_(\w+)_pz16"),
    ("arm_pretrain", r"pretrain\.arm_(\w+)_pz16"),
)
_CLASSES = {
    "VisionMamba": "mambar", "fastvim.VisionMamba": "fastvim", "vim.VisionMamba": "vim_layernorm",
    "image.VisionMamba": "videomamba", "video.VisionMamba": "videomamba", "finetune.ARM": "arm_finetune",
    "pretrain.VisionMamba": "arm_pretrain",
}  # fmt: skip


def from_published(architecture: str, model: str | None = None, **arguments: Any) -> nn.Module:
    """A model from its authors' name and constructor arguments, with randomly initialised weights.

    Args:
        architecture: "vim", "mambar", "fastvim", "vim_layernorm", "videomamba", "arm_finetune" or "arm_pretrain"; or
            the name of a published constructor, as for `model`.
        model: a published constructor of that architecture by its module and name, e.g. "image.videomamba_tiny"; None,
            or the name of the class, for the class itself.
        arguments: constructor arguments under their published names. A pair may be a list.

    Returns:
        The model, with the parameter names of the published checkpoints.

    Raises:
        ValueError: unknown names, or arguments that cannot be combined, with the reason.
        TypeError: arguments that the architecture does not have.
    """
    if architecture not in _ARCHITECTURES:
        architecture, model = _of_constructor(architecture), architecture
    own_arguments = translate_arguments(architecture, model, **arguments)
    return ArmPretraining(**own_arguments) if architecture == "arm_pretrain" else VisionMamba(**own_arguments)


def translate_arguments(architecture: str, model: str | None = None, **arguments: Any) -> dict[str, Any]:
    """The arguments of this project's class that `from_published` builds; see there."""
    translate, defaults = _ARCHITECTURES[architecture]
    if model is not None and model not in _CLASSES:
        match = re.fullmatch(dict(_CONSTRUCTORS).get(architecture, ""), model)
        size = match.group(1) if match else model
        if size not in (sizes := _SIZES.get(architecture, {})):
            raise ValueError(f"{architecture} has no model {model!r}: its sizes are {', '.join(sizes)}")
        defaults = {**defaults, **_FUSED, **sizes[size]}
    if architecture == "videomamba" and model is not None and model.startswith("video."):
        arguments = {"num_frames": 8, **arguments}
    if architecture != "vim":
        known = {*defaults, *_FURTHER.get(architecture, ())}
        if unknown := sorted(set(arguments) - known):
            raise TypeError(f"{architecture} has no argument {', '.join(unknown)}: it takes {', '.join(sorted(known))}")
    return translate(**{**defaults, **arguments})


def _of_constructor(name: str) -> str:
    if not isinstance(name, str):
        raise ValueError(f"the architecture is {name!r}, expected one of {', '.join(_ARCHITECTURES)}")
    if name in _CLASSES:
        return _CLASSES[name]
    for architecture, pattern in _CONSTRUCTORS:
        if re.fullmatch(pattern, name):
            return architecture
    raise ValueError(f"there is no architecture {name!r}: expected one of {', '.join(_ARCHITECTURES)}")
