"""The sizes of a Mamba language model, under the published name."""

from dataclasses import dataclass, field, fields
from typing import Any

_SETTINGS_OF_TRANSFORMERS = {  # name in ssm_cfg: name in transformers' MambaConfig and its default
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"),
    "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
}

# Far beyond any model that was trained: a file that asks for more would keep a process busy until memory ends.
_MOST = {"d_model": 2**17, "n_layer": 4096, "vocab_size": 10**7, "pad_vocab_size_multiple": 2**16}
_MOST_OF_MIXER = {"d_state": 1024, "d_conv": 64, "dt_rank": 2**17}


def _check_size(name: str, size: Any, most: int) -> None:
    if not isinstance(size, int) or not 1 <= size <= most:
        raise ValueError(f"{name} is {size!r}, expected a whole number of at least 1 and at most {most:,}")


@dataclass
class MambaConfig:
    """What `MambaLMHeadModel` is built from; the fields of a published `config.json`.

    Attributes:
        d_model: width D of the tokens.
        n_layer: number of blocks.
        vocab_size: tokens in the vocabulary, before padding.
        ssm_cfg: further arguments of `Mamba`; `layer` may be "Mamba1".
        rms_norm: RMSNorm instead of LayerNorm.
        residual_in_fp32: keep the residual stream in float32.
        fused_add_norm: accepted for the published signature; the residual add and the norm are always one operator.
        pad_vocab_size_multiple: the vocabulary is padded to a multiple of this.
        tie_embeddings: the head shares its weight with the embedding.
        d_intermediate: width of gated MLPs between the mixers; only 0 (none) is provided.
        attn_layer_idx, attn_cfg: attention layers of hybrid models; only none are provided.
        norm_epsilon: added to the norms' mean squares; not in published files, whose models use 1e-5.

    Raises:
        ValueError: a layer that this package does not have, or a size out of bounds.
    """

    d_model: int = 2560
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    d_intermediate: int = 0
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            _check_size(name, getattr(self, name), most)
        if not isinstance(self.ssm_cfg, dict):
            raise ValueError(f"ssm_cfg is {self.ssm_cfg!r}, expected a mapping of arguments of the mixer")
        for name, most in _MOST_OF_MIXER.items():
            if self.ssm_cfg.get(name, "auto") != "auto":
                _check_size(f"{name} of ssm_cfg", self.ssm_cfg[name], most)
        expand = self.ssm_cfg.get("expand", 2)
        if not isinstance(expand, int | float) or not 0 < expand <= 64:
            raise ValueError(f"expand of ssm_cfg is {expand!r}, expected a number above 0 and at most 64")
        layer = self.ssm_cfg.get("layer", "Mamba1")
        if layer != "Mamba1":
            raise ValueError(f"ssm_cfg asks for {layer!r} layers, but only 'Mamba1' is provided")
        if self.d_intermediate or self.attn_layer_idx:
            raise ValueError("models with MLPs (d_intermediate) or attention (attn_layer_idx) are not provided")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        """The published fields, and of the others those that differ from their defaults."""
        default = MambaConfig()
        published = [f.name for f in fields(self)][:9]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if name in published or v != getattr(default, name)}

    def to_transformers(self) -> dict[str, Any]:
        """A `config.json` from which transformers builds its `MambaForCausalLM` of this model.

        Raises:
            ValueError: the model has LayerNorm, which transformers' does not.
        """
        if not self.rms_norm:
            raise ValueError(
                "transformers' Mamba has RMSNorm only: this model, with LayerNorm, cannot be written for it"
            )
        settings = {
            theirs: self.ssm_cfg.get(ours, default) for ours, (theirs, default) in _SETTINGS_OF_TRANSFORMERS.items()
        }
        return {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layer,
            "vocab_size": self.padded_vocab_size,
            "layer_norm_epsilon": self.norm_epsilon,
            "residual_in_fp32": self.residual_in_fp32,
            "tie_word_embeddings": self.tie_embeddings,
            **settings,
        }


def config_from_dict(data: dict[str, Any]) -> MambaConfig:
    """A published configuration, or the one of transformers' `MambaForCausalLM`.

    Raises:
        ValueError: it is of another kind of model, or has fields that mean nothing here.
    """
    if not isinstance(data, dict):
        raise ValueError(f"the configuration is a {type(data).__name__}, expected a mapping of names to values")
    if "model_type" in data:
        return _from_transformers(data)
    if unknown := sorted(data.keys() - {f.name for f in fields(MambaConfig)}):
        raise ValueError(f"the configuration has fields that a Mamba model does not: {', '.join(unknown[:4])}")
    return MambaConfig(**data)


def _from_transformers(data: dict[str, Any]) -> MambaConfig:
    if data["model_type"] != "mamba":
        raise ValueError(f"the configuration is of a {data['model_type']!r} model, expected 'mamba'")
    if data.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {data['hidden_act']!r}, but the kernels have 'silu' only")
    settings = {
        ours: data[theirs]
        for ours, (theirs, default) in _SETTINGS_OF_TRANSFORMERS.items()
        if data.get(theirs, default) != default
    }
    return MambaConfig(
        d_model=data.get("hidden_size", 768),
        n_layer=data.get("num_hidden_layers", 32),
        vocab_size=data.get("vocab_size", 50280),
        ssm_cfg=settings,
        residual_in_fp32=data.get("residual_in_fp32", True),
        pad_vocab_size_multiple=1,
        tie_embeddings=data.get("tie_word_embeddings", True),
        norm_epsilon=data.get("layer_norm_epsilon", 1e-5),
    )
