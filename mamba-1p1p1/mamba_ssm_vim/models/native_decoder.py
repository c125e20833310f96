"""A step of the language model on a CPU as one call of native code.

Layer by layer in Python, a step of a small model is mostly the overhead of some twenty operators per layer. Here one
function runs all layers and the head, and reads the matrices of a large model at the memory's speed.
"""

import math
from typing import TYPE_CHECKING

import torch
from causal_conv1d_vim.runtime import cpu_library
from causal_conv1d_vim.runtime.autodiff import dispatched
from causal_conv1d_vim.runtime.backend import forced_backend
from causal_conv1d_vim.runtime.tensors import DTYPES, address, plain
from torch import nn

from mamba_ssm_vim.cpu_library import library
from mamba_ssm_vim.modules.block import Block
from mamba_ssm_vim.modules.mamba_simple import Mamba
from mamba_ssm_vim.modules.plain import is_plain, is_unhooked
from mamba_ssm_vim.ops.mixer.reference import transition
from mamba_ssm_vim.ops.norm import RMSNorm
from mamba_ssm_vim.utils.generation import InferenceParams

if TYPE_CHECKING:
    from mamba_ssm_vim.models.mixer_seq_simple import MambaLMHeadModel

LAYER = cpu_library.Arguments(
    "norm_weight norm_bias in_proj in_bias conv_weight conv_bias x_proj dt_proj dt_bias log2_decay skip out_proj "
    "out_bias conv_state conv_state_dtype scan_state"
)
ARGUMENTS = cpu_library.Arguments(
    "batch layers dim inner states rank width vocab rms dtype threads eps:double layer embedded norm_weight norm_bias "
    "head logits"
)
# Measured with width 768: two to four times as fast as the modules with 8 sequences, as fast with 64 in bfloat16,
# slower beyond, where torch's matrix products reuse a matrix more.
MOST_SEQUENCES = 64

_step = library.function("vim_decode_step", ARGUMENTS)


class NativeDecoder:
    """Scores after one more token of each sequence, from a model's weights as they are when this is made.

    Args:
        model: of which `why_not` gives None.
        params: a cache whose layers have seen the sequences' beginnings; its states are updated in place.
    """

    def __init__(self, model: "MambaLMHeadModel", params: InferenceParams) -> None:
        backbone = model.backbone
        first: Mamba = backbone.layers[0].mixer
        self._embedding, self._head = backbone.embedding, model.lm_head
        self._batch = params.key_value_memory_dict[first.layer_idx][0].shape[0]
        # What the addresses below point to must live as long as they do.
        self._kept: list[torch.Tensor] = []
        layers = b"".join(
            self._pack(layer, *params.key_value_memory_dict[layer.mixer.layer_idx]) for layer in backbone.layers
        )
        self._layers = self._keep(torch.frombuffer(bytearray(layers), dtype=torch.uint8))
        norm = backbone.norm_f
        self._sizes = (
            self._batch, len(backbone.layers), first.d_model, first.d_inner, first.d_state, first.dt_rank, first.d_conv,
            self._head.weight.shape[0], isinstance(norm, RMSNorm), DTYPES[self._head.weight.dtype],
        )  # fmt: skip
        self._eps = norm.eps
        self._norm = (self._keep(plain(norm.weight)), self._keep(plain(norm.bias)))
        self._head_address = self._keep(self._head.weight)

    def _keep(self, tensor: torch.Tensor | None) -> int:
        """The address of a tensor, which is kept alive."""
        if tensor is not None:
            self._kept.append(tensor.detach())
        return address(tensor)

    def _pack(self, layer: Block, conv_state: torch.Tensor, scan_state: torch.Tensor) -> bytes:
        mixer, norm = layer.mixer, layer.norm
        conv, dt_proj = mixer.conv1d, mixer.dt_proj
        decay = transition(mixer.A_log.detach()) * math.log2(math.e)
        small = {
            "norm_weight": norm.weight, "norm_bias": norm.bias, "in_bias": mixer.in_proj.bias,
            "conv_weight": conv.weight, "conv_bias": conv.bias, "dt_bias": dt_proj.bias, "log2_decay": decay,
            "skip": mixer.D, "out_bias": mixer.out_proj.bias,
        }  # fmt: skip
        fields = {name: self._keep(plain(tensor)) for name, tensor in small.items()}
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            fields[name] = self._keep(getattr(mixer, name).weight)
        fields["conv_state"], fields["scan_state"] = self._keep(conv_state), self._keep(scan_state)
        fields["conv_state_dtype"] = DTYPES[conv_state.dtype]
        return LAYER.pack(*(fields[name] for name in LAYER.fields))

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token numbers (B, 1) → scores (B, 1, V) of the next ones; not differentiated.

        Raises:
            ValueError: another batch size than the cache's, or more than one token.
        """
        if input_ids.shape != (self._batch, 1):
            raise ValueError(f"input_ids must be {(self._batch, 1)}, got {tuple(input_ids.shape)}")
        with torch.no_grad():
            vocab, dim = self._head.weight.shape
            embedded = self._embedding(input_ids).to(self._head.weight.dtype).reshape(self._batch, dim).contiguous()
            logits = embedded.new_empty(self._batch, 1, vocab)
            _step(
                ARGUMENTS.pack(
                    *self._sizes, torch.get_num_threads(), self._eps, self._layers, embedded.data_ptr(), *self._norm,
                    self._head_address, logits.data_ptr(),
                )
            )  # fmt: skip
        return logits


def why_not(model: "MambaLMHeadModel", params: InferenceParams) -> str | None:
    """None if `NativeDecoder` does what the model's modules do, else the reason why not."""
    if forced_backend() not in (None, "cpu"):
        return f"backend {forced_backend()!r} is forced"
    weight = model.lm_head.weight
    if (reason := cpu_library.why_not(library, weight)) is not None:
        return reason
    backbone = model.backbone
    if not is_plain(model.lm_head) or model.lm_head.bias is not None or not weight.is_contiguous():
        return "the head is no plain linear layer"
    if not all(is_unhooked(module) for module in (model, backbone, *backbone.layers)):
        return "hooks are attached"
    if dispatched((weight,)) or torch.is_autocast_enabled("cpu"):
        return "autocast or another mode of torch is on"
    kind, sizes, batch = type(backbone.norm_f), None, None
    for index, layer in enumerate(backbone.layers):
        reason = _why_not_layer(layer, kind, backbone.norm_f.eps)
        if reason is None:
            sizes = sizes or _sizes(layer.mixer)
            states = params.key_value_memory_dict.get(layer.mixer.layer_idx)
            reason = _why_not_weights(layer, weight, sizes) or _why_not_states(states, sizes, batch)
            batch = batch or (states and states[0].shape[0])
        if reason is not None:
            return f"layer {index}: {reason}"
    return None


def _sizes(mixer: Mamba) -> tuple[int, int, int, int, int]:
    """D, E, N, R, W."""
    return mixer.d_model, mixer.d_inner, mixer.d_state, mixer.dt_rank, mixer.d_conv


def _why_not_weights(layer: Block, like: torch.Tensor, sizes: tuple[int, int, int, int, int]) -> str | None:
    mixer, (D, E, N, R, W) = layer.mixer, sizes
    matrices = {"in_proj": (2 * E, D), "x_proj": (R + 2 * N, E), "dt_proj": (E, R), "out_proj": (D, E)}
    for name, shape in matrices.items():
        matrix = getattr(mixer, name).weight
        if matrix.shape != shape or not (matrix.is_cpu and matrix.dtype is like.dtype and matrix.is_contiguous()):
            return f"{name} has another shape, dtype, device or layout than the model's"
    others = ((mixer.conv1d.weight, (E, 1, W)), (mixer.A_log, (E, N)), (mixer.D, (E,)), (layer.norm.weight, (D,)))
    if any(t.shape != shape or not t.is_cpu for t, shape in others):
        return "it has other sizes than the first layer"
    return None


def _why_not_states(
    states: tuple[torch.Tensor, torch.Tensor] | None, sizes: tuple[int, int, int, int, int], batch: int | None
) -> str | None:
    if states is None:
        return "it has no states: run the model on the prompt first"
    (_, E, N, _, W), (conv_state, scan_state) = sizes, states
    batch = batch or conv_state.shape[0]
    if batch > MOST_SEQUENCES:
        return f"the batch has more than {MOST_SEQUENCES} sequences"
    if conv_state.dtype not in DTYPES or scan_state.dtype is not torch.float32:
        return f"its states are {conv_state.dtype} and {scan_state.dtype}"
    if (conv_state.shape, scan_state.shape) != ((batch, E, W), (batch, E, N)):
        return "its states have other shapes"
    if not (conv_state.is_contiguous() and scan_state.is_contiguous()):
        return "its states are not contiguous"
    return None


def _why_not_layer(layer: nn.Module, norm: type, eps: float) -> str | None:
    mixer = getattr(layer, "mixer", None)
    if not isinstance(layer, Block) or layer.mlp is not None or type(mixer) is not Mamba:
        return "it is no block with a Mamba alone"
    if mixer.bimamba_type != "none" or hasattr(mixer, "gamma"):
        return "its mixer has two directions or a factor"
    parts = (layer.norm, mixer.in_proj, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if not is_unhooked(mixer) or not all(is_plain(part) for part in parts):
        return "it has parts that must be called"
    if (
        type(layer.norm) is not norm
        or layer.norm.eps != eps
        or mixer.x_proj.bias is not None
        or mixer.dt_proj.bias is None
    ):
        return "its norm or biases are not those of the model"
    return None
