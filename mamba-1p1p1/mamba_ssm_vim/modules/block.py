"""Residual add, norm and mixer: the block that language models are stacked from."""

from collections.abc import Callable

import torch
from torch import nn

from mamba_ssm_vim.modules.plain import is_plain
from mamba_ssm_vim.ops.norm import RMSNorm, add_norm
from mamba_ssm_vim.utils.generation import InferenceParams


class Block(nn.Module):
    """residual += hidden; hidden = mixer(norm(residual)), with the norm first, as one operator with the addition.

    Args:
        dim: width D of the tokens.
        mixer_cls: called with `dim`, gives the mixer.
        mlp_cls: called with `dim`, gives an MLP that follows with a norm of its own; `nn.Identity` for none.
        norm_cls: called with `dim`, gives a norm.
        fused_add_norm: accepted for the published signature.
        residual_in_fp32: keep the residual stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, L, D) and residual (B, L, D) or None → both after this block, not yet added."""
        hidden_states, residual = normalise(self.norm, hidden_states, residual, self.residual_in_fp32)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = normalise(self.norm2, hidden_states, residual, self.residual_in_fp32)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixer's zero states; see `Mamba.allocate_inference_cache`."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def normalise(
    norm: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None, residual_in_fp32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(hidden_states + residual) in the dtype of hidden_states, and the sum, in float32 or more if asked for."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32) if residual_in_fp32 else hidden_states.dtype
    if isinstance(norm, nn.LayerNorm | RMSNorm) and is_plain(norm) and not getattr(norm, "dropout_p", 0.0):
        return add_norm(
            hidden_states, residual, norm.weight, norm.bias, eps=norm.eps, rms=isinstance(norm, RMSNorm),
            residual_dtype=dtype,
        )  # fmt: skip
    total = hidden_states if residual is None else hidden_states + residual
    return norm(total.to(norm.weight.dtype if norm.weight is not None else dtype)).to(hidden_states.dtype), total.to(
        dtype
    )
