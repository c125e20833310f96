"""Registered models of what was built on Vim. Facts and licences per architecture: docs/zoo.md."""

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model

from vim.models.published import translate_arguments
from vim.models.registry import config, create
from vim.models.vision_mamba import VisionMamba

_UNSTATED = "none stated by the authors"
_MAMBAR: dict[str, Any] = {
    "license": _UNSTATED, "crop_pct": 1.0, "paper_ids": "arXiv:2405.14858",
    "paper_name": "Mamba-R: Vision Mamba ALSO Needs Registers", "origin_url": "https://github.com/wangf3014/Mamba-Reg",
}  # fmt: skip
_FASTVIM: dict[str, Any] = {
    "license": "cc-by-nc-sa-4.0", "paper_ids": "arXiv:2502.00594",
    "paper_name": "Fast Vision Mamba: Pooling Spatial Dimensions for Accelerated Processing",
    "origin_url": "https://github.com/insitro/FastVim",
}  # fmt: skip
_VIDEOMAMBA: dict[str, Any] = {
    "license": "apache-2.0", "paper_ids": "arXiv:2403.06977", "hf_hub_id": "OpenGVLab/VideoMamba",
    "paper_name": "VideoMamba: State Space Model for Efficient Video Understanding",
    "origin_url": "https://github.com/OpenGVLab/VideoMamba",
}  # fmt: skip
_ARM: dict[str, Any] = {
    "license": _UNSTATED, "paper_ids": "arXiv:2406.07537",
    "paper_name": "Autoregressive Pretraining with Mamba in Vision", "origin_url": "https://github.com/OliverRensu/ARM",
}  # fmt: skip
_RELEASE = "https://github.com/insitro/FastVim/releases/download/v0/"


def _mambar(size: str) -> dict[str, Any]:
    name = f"mambar_{size}_patch16_224.pth"
    return config(**_MAMBAR, hf_hub_id="Wangf3014/Mamba-Reg", hf_hub_filename=name)


def _image(size: str, stages: str = "224", **kwargs: Any) -> dict[str, Any]:
    return config(**_VIDEOMAMBA, hf_hub_filename=f"videomamba_{size}16_in1k_res{stages}.pth", **kwargs)


def _clip(size: str) -> dict[str, Any]:
    return config(**_VIDEOMAMBA, hf_hub_filename=f"videomamba_{size}16_k400_f8_res224.pth", num_classes=400)


default_cfgs = generate_default_cfgs(
    {
        "mambar_tiny_patch16_224.untrained": config(**_MAMBAR),
        **{f"mambar_{size}_patch16_224.in1k": _mambar(size) for size in ("small", "base", "large")},
        **{
            f"fastvim_{size}_patch16_224.in1k": config(**_FASTVIM, url=f"{_RELEASE}FastVim_{size}.ckpt")
            for size in ("tiny", "small", "base")
        },
        "vim_base_layernorm_patch16_224.in1k": config(**_FASTVIM, url=f"{_RELEASE}Vim_base_withlayernorm.ckpt"),
        "vim_base_layernorm_patch16_224.mae_in1k": config(**_FASTVIM, url=f"{_RELEASE}finetune_Vim_base.ckpt"),
        **{
            f"videomamba_{size}_patch16_224.in1k": _image(size[0])
            for size in ("tiny", "small", "middle", "base")
        },
        **{
            f"videomamba_{size}_patch16_224.in1k_448": _image(size[0], stages="224to448", input_size=(3, 448, 448))
            for size in ("tiny", "small", "middle")
        },
        **{
            f"videomamba_{size}_patch16_224.in1k_576": _image(
                size[0], stages="224to448to576", input_size=(3, 576, 576)
            )
            for size in ("tiny", "small", "middle")
        },
        **{
            f"videomamba_{size}_patch16_f8_224.k400": _clip(size[0]) for size in ("tiny", "small", "middle")
        },
        **{f"arm_{size}_patch16_224.untrained": config(**_ARM) for size in ("base", "large", "huge")},
    }
)  # fmt: skip


def _register(name: str, summary: str, architecture: str, constructor: str, **published: Any) -> Callable[..., Any]:
    """Register a model under `name`, built as its authors' `constructor` builds it."""

    def entry_point(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
        # The stride follows the patch size, and the width of an MLP the model's.
        sizes = {name: kwargs[name] for name in ("patch_size", "embed_dim") if name in kwargs}
        own = translate_arguments(architecture, constructor, **{**published, **sizes})
        if "patch_size" in sizes:
            own["stride"] = sizes["patch_size"]
        return create(name, pretrained, **{**own, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__, entry_point.__doc__ = __name__, summary
    return register_model(entry_point)


for _size, _top1 in (("tiny", "no accuracy given"), ("small", "81.4 %"), ("base", "83.0 %"), ("large", "83.6 %")):
    _name = f"mambar_{_size}_patch16_224"
    globals()[_name] = _register(_name, f"Mamba-R, registers among the patches: {_top1} top-1.", "mambar", _size)
for _size, _top1 in (("tiny", 75.4), ("small", 81.1), ("base", 82.6)):
    _name = f"fastvim_{_size}_patch16_224"
    globals()[_name] = _register(_name, f"FastVim, scans of pooled rows: {_top1} % top-1.", "fastvim", _size)
vim_base_layernorm_patch16_224 = _register(
    "vim_base_layernorm_patch16_224", "Vim-B with LayerNorm after the scan: 82.6 % top-1.", "vim_layernorm", "base"
)
for _size, _top1 in (("tiny", 76.9), ("small", 81.2), ("middle", 82.8), ("base", 82.7)):
    _name = f"videomamba_{_size}_patch16_224"
    globals()[_name] = _register(
        _name, f"VideoMamba on images: {_top1} % top-1.", "videomamba", f"image.videomamba_{_size}"
    )
for _size, _top1 in (("tiny", 76.9), ("small", 79.3), ("middle", 80.6)):
    _name = f"videomamba_{_size}_patch16_f8_224"
    globals()[_name] = _register(
        _name, f"VideoMamba on clips of 8 frames: {_top1} % top-1 on Kinetics-400.", "videomamba",
        f"video.videomamba_{_size}", num_classes=400,
    )  # fmt: skip
for _size, _top1 in (("base", "83.2 %"), ("large", "no accuracy given"), ("huge", "85.0 %")):
    _name = f"arm_{_size}_patch16_224"
    globals()[_name] = _register(
        _name, f"ARM, scans along rows and columns, and SwiGLU: {_top1} top-1 after its pretraining.", "arm_finetune",
        _size, global_pool=True,
    )  # fmt: skip
