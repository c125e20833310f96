"""What a user's type checker sees of the three packages. Never run: scripts/test.sh checks it with mypy, strictly."""

from typing import Any, assert_type

import torch
from causal_conv1d_vim import causal_conv1d, causal_conv1d_fn
from mamba_ssm_vim import Direction, Mamba, bimamba_inner, selective_scan, use_backend
from torch import Tensor

from vim import VisionMamba
from vim.models import extract_state_dict, load_checkpoint


def models(x: Tensor) -> None:
    model = VisionMamba(img_size=224, embed_dim=192, depth=24)
    assert_type(model.forward_features(x), Tensor)
    assert_type(model.forward_head(x, pre_logits=True), Tensor)
    model.reset_classifier(10, "avg")
    model.set_input_size((256, 320))
    model.set_grad_checkpointing(True)
    checkpoint = load_checkpoint("file.pth")
    assert_type(extract_state_dict(checkpoint), dict[str, Tensor])


def operators(u: Tensor, A: Tensor, B: Tensor) -> None:
    with use_backend("cpu"):
        assert_type(causal_conv1d(u, A, None, activation="silu"), Tensor)
        causal_conv1d_fn(u, A)
        selective_scan(u, u, A, B, B, delta_softplus=True)


def mixers(x: Tensor, directions: list[Direction]) -> None:
    mixer = Mamba(192, bimamba_type="v2", if_divide_out=True, dtype=torch.float32)
    assert_type(mixer.directions(), list[Direction])
    kwargs: dict[str, Any] = {}
    bimamba_inner(x, directions[0], directions[1], **kwargs)
