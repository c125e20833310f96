"""Learning rates that fall from the last block to the first, for mmengine's optimizers."""

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn

from vim.dense.backbone import VimBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VimLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise decay of the backbone's learning rate, and no weight decay where the published runs have none.

    Of n blocks, counted from 0, block i learns at lr · rate^(n - i), the patch and position embeddings at
    lr · rate^(n + 1), the last norm as the last block, neck and heads at lr. One-dimensional parameters, position
    embedding and class tokens are not decayed.

    `paramwise_cfg` takes `layer_decay_rate`, between 0 and 1.

    Raises:
        ValueError: `layer_decay_rate` is missing or out of range, or the model's backbone is another one.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append one group per learning rate and weight decay to `params`, with `lr_scale` and `param_names`."""
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f"layer_decay_rate is {rate!r} in paramwise_cfg, expected a number above 0 and up to 1")
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, VimBackbone):
            raise ValueError(f"VimLayerDecayConstructor needs a VimBackbone, got {type(backbone).__name__}")
        vim = backbone.vim
        layer_of = group_parameters(vim, vim.group_matcher(), reverse=True)
        top = len(vim.layers) + 1
        no_decay = vim.no_weight_decay()
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            own = name.removeprefix("backbone.vim.")
            in_backbone = own != name
            layer = layer_of[own] if in_backbone else top
            decayed = parameter.ndim > 1 and not (in_backbone and own in no_decay)
            if (layer, decayed) not in groups:
                scale = rate ** (top - layer)
                groups[layer, decayed] = {
                    "params": [],
                    "param_names": [],
                    "lr_scale": scale,
                    "lr": self.base_lr * scale,
                    "weight_decay": (self.base_wd or 0.0) if decayed else 0.0,
                }
            groups[layer, decayed]["params"].append(parameter)
            groups[layer, decayed]["param_names"].append(name)
        params.extend(groups[key] for key in sorted(groups))
        print_log(
            f"layer decay {rate}: learning rates from {self.base_lr * rate**top:.3g} (embeddings) to "
            f"{self.base_lr:.3g} (heads) in {len(groups)} groups",
            logger="current",
        )
