"""Convolution states of packed sequences, under the published names."""

import torch


def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """The last `state_len` tokens of every sequence, zeros before a shorter one.

    Args:
        x: (tokens, D), the sequences one after another.
        cu_seqlens: (sequences + 1,) integers, where each starts and the last ends: cumulative lengths from 0.
        state_len: tokens to keep.

    Returns:
        (sequences, D, state_len) in x's dtype.
    """
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    index = ends + torch.arange(-state_len, 0, dtype=torch.int64, device=x.device)
    mine = index >= starts
    if not x.shape[0]:
        return x.new_zeros(starts.shape[0], x.shape[1], state_len)
    return x[index.where(mine, 0)].where(mine.unsqueeze(-1), 0).transpose(1, 2)


def causal_conv1d_varlen_states_ref(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """`causal_conv1d_varlen_states`, one sequence after another."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for state, start, end in zip(states, bounds[:-1], bounds[1:], strict=True):
        kept = min(state_len, end - start)
        state[:, state_len - kept :] = x[end - kept : end].t()
    return states
