"""Merging similar tokens at inference: bipartite soft matching (ToMe, arXiv 2210.09461) with the order of tokens kept.

Keeping the order is what scans need (Famba-V, arXiv 2409.09808). Special tokens are left alone, and the patches between
two of them are merged among themselves, so that special tokens have the same index in every sample.
"""

import torch
from timm.models import register_notrace_function

from vim.models.layout import TokenLayout


def _merge_segment(
    tokens: torch.Tensor, residual: torch.Tensor, sizes: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge `count` of the even tokens (B, n, D) into the odd tokens most similar to them."""
    batch, length, dim = tokens.shape[0], tokens.shape[1], tokens.shape[2]
    metric = torch.nn.functional.normalize((tokens.to(residual.dtype) + residual).float(), dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    best, partner = scores.max(-1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :count]
    source, target = 2 * chosen, 2 * partner.gather(1, chosen) + 1
    place = torch.arange(length, device=tokens.device).expand(batch, -1)
    left = place.scatter(1, source, length).sort(dim=-1)[0][:, : length - count].unsqueeze(-1)
    source, target = source.unsqueeze(-1), target.unsqueeze(-1)
    merged = sizes.scatter_add(1, target, sizes.gather(1, source))
    outputs: list[torch.Tensor] = []
    for values in (tokens, residual):
        weighted = values.float() * sizes
        wide = source.expand(-1, -1, dim)
        sums = weighted.scatter_add(1, target.expand(-1, -1, dim), weighted.gather(1, wide))
        outputs.append((sums / merged).to(values.dtype).gather(1, left.expand(-1, -1, dim)))
    return outputs[0], outputs[1], merged.gather(1, left)


@register_notrace_function
def merge_tokens(
    tokens: torch.Tensor, residual: torch.Tensor, sizes: torch.Tensor, layout: TokenLayout, ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenLayout]:
    """Merge a share of the patches between special tokens.

    Args:
        tokens, residual: hidden states and residual stream (B, L, D); their sum is what is compared.
        sizes: (B, L, 1), how many patches each token represents.
        layout: of the sequence.
        ratio: share of the patches that is merged into others, at most a half.

    Returns:
        The same for the shorter sequence. Its patches are no grid any more: the layout has one row of them.
    """
    hidden_pieces: list[torch.Tensor] = []
    residual_pieces: list[torch.Tensor] = []
    size_pieces: list[torch.Tensor] = []
    positions: list[int] = []
    start, placed, length = 0, 0, tokens.shape[1]
    for end in layout.positions + [length]:  # noqa: RUF005  TorchScript knows no unpacking
        hidden, stream, size = tokens[:, start:end], residual[:, start:end], sizes[:, start:end]
        count = int((end - start) * ratio)
        if count > 0:
            hidden, stream, size = _merge_segment(hidden, stream, size, count)
        placed += end - start - count
        if end < length:
            # The special token behind the segment.
            hidden = torch.cat((hidden, tokens[:, end : end + 1]), 1)
            stream = torch.cat((stream, residual[:, end : end + 1]), 1)
            size = torch.cat((size, sizes[:, end : end + 1]), 1)
            positions.append(placed)
            placed += 1
        hidden_pieces.append(hidden)
        residual_pieces.append(stream)
        size_pieces.append(size)
        start = end + 1
    merged = TokenLayout((1, placed - len(positions)), 1, positions)
    return torch.cat(hidden_pieces, 1), torch.cat(residual_pieces, 1), torch.cat(size_pieces, 1), merged
