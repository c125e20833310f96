"""The hidden attention of a selective scan (arXiv 2403.01590): the token-to-token matrix that it applies unseen.

For given steps and projections the scan is linear in its input: y = M u per channel. Legend: B batch, L tokens, E inner
channels, N states.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mamba_ssm_vim import Mamba
from mamba_ssm_vim.ops.mixer.reference import convolve, select
from torch import nn

from vim.models.layers import MixerBlock

# Elements of a block of the matrix that is held at a time: 64 MiB of float32.
_BLOCK = 2**24


class ScanInputs(NamedTuple):
    """What one scan of a mixer runs on: u, delta (B, L, E), A (E, N), B, C (B, L, N), D, bias (E,), its direction."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    delta_bias: torch.Tensor | None
    reverse: bool

    def step(self) -> torch.Tensor:
        """The positive step (B, L, E) in float32 or float64."""
        delta = self.delta.to(torch.promote_types(self.delta.dtype, torch.float32))
        return F.softplus(delta if self.delta_bias is None else delta + self.delta_bias)


def scan_matrix(inputs: ScanInputs, channels: slice = slice(None)) -> torch.Tensor:
    """The matrix M (B, E', L, L) with y = M u for the ungated scan, row t the weights of output t.

        M[t, s] = sum_n C_t[n] exp(A[n] (dt_{s+1} + ... + dt_t)) dt_s B_s[n],   plus D where t = s

    Args:
        inputs: of the scan.
        channels: the E' of its E channels that are wanted; the matrix of all of them may not fit into memory.
    """
    dt = inputs.step()[..., channels]
    A, B, C, D = inputs.A[channels].to(dt.dtype), inputs.B.to(dt.dtype), inputs.C.to(dt.dtype), inputs.D[channels]
    if inputs.reverse:
        dt, B, C = dt.flip(1), B.flip(1), C.flip(1)
    # The running sum in float64: differences of long sums lose digits. Above the diagonal the exponent would overflow.
    total = dt.double().cumsum(1)
    between = (total[:, :, None] - total[:, None]).to(dt.dtype).permute(0, 3, 1, 2).clamp(min=0)
    matrix = torch.zeros_like(between)
    for n in range(A.shape[1]):
        weight = C[:, None, :, None, n] * B[:, None, None, :, n]
        matrix += torch.exp(A[:, n, None, None] * between) * weight
    matrix = (matrix * dt.transpose(1, 2)[:, :, None]).tril()
    matrix = matrix + torch.diag_embed(D.to(dt.dtype)[:, None].expand(-1, matrix.shape[-1]))
    return matrix.flip(2, 3) if inputs.reverse else matrix


def scan_inputs(mixer: Mamba, hidden: torch.Tensor) -> list[ScanInputs]:
    """The inputs of every scan of a mixer for normalised tokens (B, L, D), the forward direction first.

    Raises:
        ValueError: a mixer that is more than Vim's, such as one that pools its tokens.
    """
    if type(mixer) is not Mamba:
        raise ValueError(f"the scans of {type(mixer).__name__} are not Vim's: only the mixer Mamba can be taken apart")
    x, _ = mixer.in_proj(hidden).chunk(2, dim=-1)
    found = []
    for p in mixer.directions():
        u = convolve(x, p.conv_weight, p.conv_bias, p.reverse)
        delta, B, C = select(u, p.x_proj_weight, p.dt_proj_weight, p.A)
        for _, A, reverse in p.scans():
            found.append(ScanInputs(u, delta, A, B.squeeze(2), C.squeeze(2), p.D, p.dt_bias, reverse))
    return found


def capture_hidden(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What every block's mixer reads for these images: normalised tokens (B, L, D), block by block."""
    kept: list[torch.Tensor] = []
    blocks = [block for block in model.modules() if isinstance(block, MixerBlock)]
    handles = [block.mixer.register_forward_pre_hook(lambda module, given: kept.append(given[0])) for block in blocks]
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def hidden_attention(model: nn.Module, images: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """The mean over channels of |M|, one (B, L, L) for each scan of a block, the forward direction first.

    Tokens are in the order of the sequence, class tokens where they sit. Row t says which tokens output t reads.

    Args:
        model: a `VisionMamba`, left in evaluation mode.
        images: (B, C, H, W).
        layer: index of the block.

    Raises:
        ValueError: an index that the depth does not have, or see `scan_inputs`.
    """
    if not 0 <= layer < len(model.layers):
        raise ValueError(f"layer is {layer}, expected 0 to {len(model.layers) - 1}")
    hidden = capture_hidden(model, images)[layer]
    matrices = []
    for inputs in scan_inputs(model.layers[layer].mixer, hidden):
        batch, length, dim = inputs.u.shape
        width = max(1, _BLOCK // (batch * length * length))
        total = torch.zeros(batch, length, length, device=hidden.device)
        for start in range(0, dim, width):
            total += scan_matrix(inputs, slice(start, start + width)).abs().sum(1)
        matrices.append(total / dim)
    return matrices


@torch.no_grad()
def decay_lengths(model: nn.Module, images: torch.Tensor) -> list[list[torch.Tensor]]:
    """How many tokens a state remembers: -1 / (A times the mean step), after which exp(-1) of an input is left.

    Returns:
        For each block, for each scan of it, lengths (E, N) in tokens.
    """
    lengths = []
    for block, hidden in zip(model.layers, capture_hidden(model, images), strict=True):
        scans = scan_inputs(block.mixer, hidden)
        lengths.append([-1 / (s.A * s.step().mean((0, 1))[:, None]) for s in scans])
    return lengths
