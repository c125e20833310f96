"""The Mamba language model: embedding, blocks, norm and head, under the published names.

Legend: B batch, L tokens, D width of the tokens, V padded size of the vocabulary.
"""

import json
import logging
import math
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mamba_ssm_vim.models.config_mamba import MambaConfig, config_from_dict
from mamba_ssm_vim.modules.block import Block, normalise
from mamba_ssm_vim.modules.mamba_simple import Mamba
from mamba_ssm_vim.ops.norm import RMSNorm
from mamba_ssm_vim.utils.generation import GenerationMixin, InferenceParams
from mamba_ssm_vim.utils.hf import CONFIG_NAME, load_config_hf, load_state_dict_hf, save_state_dict

__all__ = ["Block", "CausalLMOutput", "MambaConfig", "MambaLMHeadModel", "MixerModel", "create_block"]

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])

if TYPE_CHECKING:
    from mamba_ssm_vim.models.native_decoder import NativeDecoder

_logger = logging.getLogger("vision_mamba")

LAYOUTS = ("mamba_ssm", "transformers")
# Names below "backbone." that differ: here, and in transformers' MambaForCausalLM.
_EMBEDDING, _EMBEDDING_OF_TRANSFORMERS = "backbone.embedding.", "backbone.embeddings."


def create_block(
    d_model: int,
    ssm_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """One block with a `Mamba` mixer.

    Args:
        d_model: width D of the tokens.
        ssm_cfg: further arguments of `Mamba`.
        norm_epsilon: added to the norm's mean square or variance.
        rms_norm: RMSNorm instead of LayerNorm.
        residual_in_fp32: keep the residual stream in float32.
        fused_add_norm: accepted for the published signature.
        layer_idx: index under which an inference cache keeps this block's states.
        device, dtype: of the parameters.
    """
    factory = {"device": device, "dtype": dtype}
    settings = {name: value for name, value in (ssm_cfg or {}).items() if name != "layer"}
    block = Block(
        d_model,
        partial(Mamba, layer_idx=layer_idx, **settings, **factory),
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Embeddings normal with this deviation, biases zero, and what is added to the residual stream scaled with depth.

    With N blocks the output projections start at 1 / sqrt(N * n_residuals_per_layer) of their usual scale, as in GPT-2.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual and isinstance(module, Mamba):
        weight = module.out_proj.weight
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        with torch.no_grad():
            weight /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Embedding, blocks and final norm.

    Args:
        d_model: width D of the tokens.
        n_layer: number of blocks.
        vocab_size: rows V of the embedding.
        ssm_cfg: further arguments of `Mamba`.
        norm_epsilon: added to the norms' mean squares or variances.
        rms_norm: RMSNorm instead of LayerNorm.
        initializer_cfg: further arguments of the initialisation: `initializer_range`, `rescale_prenorm_residual`,
            `n_residuals_per_layer`.
        fused_add_norm: accepted for the published signature.
        residual_in_fp32: keep the residual stream in float32.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(d_model, ssm_cfg, norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm, i, **factory)
            for i in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {})))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Zero states by layer; see `Mamba.allocate_inference_cache`."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(
        self, input_ids: torch.Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs
    ) -> torch.Tensor:
        """Token numbers (B, L) → hidden states (B, L, D); with `inference_params` they continue earlier tokens."""
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params=inference_params, **mixer_kwargs)
        return normalise(self.norm_f, hidden_states, residual, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model, with `generate`, and weights in the published layout.

    Args:
        config: its sizes.
        initializer_cfg: see `MixerModel`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        vocab_size = config.padded_vocab_size
        self.backbone = MixerModel(
            config.d_model, config.n_layer, vocab_size, config.ssm_cfg, config.norm_epsilon, config.rms_norm,
            initializer_cfg, config.fused_add_norm, config.residual_in_fp32, **factory,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        self.lm_head.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head have the embedding's weight, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Zero states by layer; see `Mamba.allocate_inference_cache`."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs,
    ) -> CausalLMOutput:
        """Scores of the next token after each token.

        Args:
            input_ids: (B, L) token numbers.
            position_ids: accepted for callers of transformers; a Mamba has no positions.
            inference_params: the tokens continue those seen in earlier calls with it.
            num_last_tokens: if not 0, scores are given after this many last tokens only.

        Returns:
            A named tuple with `logits` (B, L or num_last_tokens, V).
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    def decoder(self, inference_params: InferenceParams) -> "NativeDecoder | None":
        """A faster way to score one more token of each sequence on a CPU, or None where there is none.

        It is called with token numbers (B, 1), gives scores (B, 1, V) and updates the states in `inference_params`,
        which must have seen the prompts. It has the weights that the model has now.
        """
        from mamba_ssm_vim.models.native_decoder import NativeDecoder, why_not  # here: it loads the native library

        reason = why_not(self, inference_params)
        if reason is None:
            return NativeDecoder(self, inference_params)
        _logger.debug("the language model decodes layer by layer: %s", reason)
        return None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ) -> "MambaLMHeadModel":
        """A model with published weights, in the layout of mamba_ssm or of transformers.

        Args:
            pretrained_model_name: a folder with `config.json` and the weights, or a hub id, such as
                "state-spaces/mamba-130m" or "state-spaces/mamba-130m-hf".
            device, dtype: of the parameters; A and D stay float32.
            kwargs: further arguments of the class.

        Raises:
            ValueError: nothing there, damaged or unsafe files, another kind of model, or weights that do not fit.
        """
        config = config_from_dict(load_config_hf(pretrained_model_name))
        state = to_own_layout(load_state_dict_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        if config.tie_embeddings:
            state.setdefault("lm_head.weight", state.get("backbone.embedding.weight"))
        own = model.state_dict()
        wrong = sorted(
            n for n in own.keys() | state.keys() if n not in state or n not in own or _shape(state, n) != own[n].shape
        )
        if wrong:
            raise ValueError(
                f"the weights of {pretrained_model_name} do not fit its configuration: {', '.join(wrong[:4])} "
                f"{'and others ' if len(wrong) > 4 else ''}are missing, unexpected or of another shape"
            )
        model.load_state_dict(state)
        return model

    def save_pretrained(self, save_directory: str | Path, layout: str = "mamba_ssm") -> None:
        """Write `config.json` and the weights.

        Args:
            save_directory: folder, made if it is missing.
            layout: "mamba_ssm", as published (`pytorch_model.bin`), or "transformers" (`model.safetensors`), which
                `transformers.MambaForCausalLM.from_pretrained` reads. `from_pretrained` reads both.

        Raises:
            ValueError: another layout, or a model with LayerNorm for transformers.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        state = self.state_dict()
        if layout == "transformers":
            config = self.config.to_transformers()
            config["dtype"] = str(self.lm_head.weight.dtype).removeprefix("torch.")
            if self.config.tie_embeddings:
                del state["lm_head.weight"]
            state = {n.replace(_EMBEDDING, _EMBEDDING_OF_TRANSFORMERS): t for n, t in state.items()}
        else:
            config = self.config.to_dict()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_state_dict(state, folder, safe=layout == "transformers")
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def to_own_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of mamba_ssm's or transformers' Mamba under this package's names."""
    return {name.replace(_EMBEDDING_OF_TRANSFORMERS, _EMBEDDING): tensor for name, tensor in state.items()}


def _shape(state: dict[str, Any], name: str) -> torch.Size | None:
    return getattr(state[name], "shape", None)
