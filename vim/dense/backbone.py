"""`VimFeatures` as a backbone of mmdet and mmseg."""

from collections.abc import Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from vim.dense.features import VimFeatures


@MODELS.register_module()
class VimBackbone(VimFeatures, BaseModule):
    """Feature maps of a registered Vim model, with the arguments of `VimFeatures` and these.

    Args:
        init_cfg: dict(type="Pretrained", checkpoint=PATH): a classification checkpoint, published or own, as a file or
            "hf-hub:owner/repository/file".
        use_ema: use the averaged weights of the checkpoint.

    Raises:
        ValueError: see `VimFeatures`.
    """

    def __init__(
        self,
        arch: str,
        img_size: int | tuple[int, int],
        out_indices: Sequence[int],
        *,
        init_cfg: dict[str, Any] | None = None,
        use_ema: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(arch, img_size, out_indices, **arguments)
        self.init_cfg, self.use_ema = init_cfg, use_ema

    def init_weights(self) -> None:
        """Load the checkpoint that `init_cfg` names, if any; the model initialised itself when it was built.

        Raises:
            CheckpointError: it cannot be read or is of another model, see `vim.models.load_into`.
        """
        self._is_init = True
        if self.init_cfg:
            self.load_file(self.init_cfg["checkpoint"], use_ema=self.use_ema)
            print_log(f"backbone weights: {self.init_cfg['checkpoint']}", logger="current")
