"""Learning rates that fall from the last block to the first, for mmengine's optimizers."""

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from vim.dense.features import layer_decay_groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VimLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """The groups of `layer_decay_groups`, for a model whose `backbone` is a `VimBackbone`.

    `paramwise_cfg` takes `layer_decay_rate`, between 0 and 1.

    Raises:
        ValueError: `layer_decay_rate` is missing or out of range, or the model's backbone is no `VimBackbone`.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append one group per learning rate and weight decay to `params`, with `lr_scale` and `param_names`."""
        rate = self.paramwise_cfg.get("layer_decay_rate")
        vim = getattr(getattr(module, "backbone", None), "vim", None)
        groups = layer_decay_groups(module.named_parameters(), vim, "backbone.vim.", rate, self.base_wd or 0.0)
        for group in groups:
            group["lr"] = self.base_lr * group["lr_scale"]
        params.extend(groups)
        print_log(
            f"layer decay {rate}: learning rates from {min(g['lr'] for g in groups):.3g} (embeddings) to "
            f"{self.base_lr:.3g} (heads) in {len(groups)} groups",
            logger="current",
        )
