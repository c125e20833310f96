"""The published, channel-first interface of causal-conv1d: its names, argument order and shapes.

Legend: B batch, D channels, L tokens, W width of the kernel, S length of a convolution state (S >= W - 1).
"""

import torch
import torch.nn.functional as F

from causal_conv1d_vim.conv import causal_conv1d
from causal_conv1d_vim.conv import causal_conv1d_ref as token_major_ref
from causal_conv1d_vim.conv.op import ACTIVATIONS, check_arguments
from causal_conv1d_vim.runtime.operators import check, check_integers


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | str | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution, differentiable in x, weight, bias and initial_states.

    Args:
        x: (B, D, L), channel-first or channel-last in memory; the output has the same layout.
        weight: (D, W).
        bias: (D,) or None.
        seq_idx: (B, L) integers or None: tokens of different numbers do not see each other, and the output of a token
            with a negative number (padding) is zero. The activation may be passed in its place, as before 1.2.
        initial_states: (B, D, W-1), the inputs before the first token, oldest first; with `seq_idx` they belong to the
            first sequence of each row.
        return_final_states: also return the last W-1 inputs (B, D, W-1), with `seq_idx` those of the last sequence.
        final_states_out: (B, D, W-1), where to write them.
        activation: None, "silu" or "swish" (the same).

    Returns:
        out (B, D, L) in x's dtype, and with `return_final_states` (out, final states).

    Raises:
        ValueError: unknown activation, or shapes that do not fit.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    _check(x, weight, bias, initial_states, activation)
    tokens, past = x.transpose(1, 2), None if initial_states is None else initial_states.transpose(1, 2)
    if seq_idx is None:
        if not x.is_cpu:
            # The other backends want channels adjacent: one copy here, not one in forward and another in backward.
            tokens = tokens.contiguous()
        out = causal_conv1d(tokens, weight, bias, activation=activation, initial_state=past)
    else:
        check_integers("seq_idx", seq_idx, tokens.shape[:2])
        out = _within_sequences(tokens, weight, bias, seq_idx, past, activation)
    out = out.transpose(1, 2)
    if x.stride(2) == 1 and x.stride(1) != 1:
        out = out.contiguous()
    if not return_final_states:
        return out
    return out, _final_states(x, weight.shape[1] - 1, initial_states, seq_idx, final_states_out)


def causal_conv1d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | str | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`causal_conv1d_fn` without `seq_idx`, in plain PyTorch; the fourth argument may be the activation as there."""
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    _check(x, weight, bias, initial_states, activation)
    past = None if initial_states is None else initial_states.transpose(1, 2)
    out = token_major_ref(x.transpose(1, 2), weight, bias, past, silu=activation is not None).transpose(1, 2)
    if not return_final_states:
        return out
    return out, _final_states(x, weight.shape[1] - 1, initial_states, None, final_states_out)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve new tokens that follow those in `conv_state`, and update it in place.

    Gradients reach x, weight and bias, not the state.

    Args:
        x: (B, D) or (B, D, L).
        conv_state: (B, D, S), or (rows, D, S) with `conv_state_indices`; any dtype. Without `cache_seqlens` the last
            inputs, oldest first (rolling).
        weight: (D, W).
        bias: (D,) or None.
        activation: None, "silu" or "swish".
        cache_seqlens: (B,) integers or None: tokens seen so far; the state is then circular, token t in column t mod S.
        conv_state_indices: (B,) integers or None: the row of `conv_state` of each batch entry; for a negative one the
            output is zero and no row is touched.

    Returns:
        Like x, in its dtype.

    Raises:
        ValueError: unknown activation, or shapes that do not fit.
    """
    if conv_state_indices is None:
        return _update(causal_conv1d, x, conv_state, weight, bias, activation, cache_seqlens)
    check_integers("conv_state_indices", conv_state_indices, x.shape[:1])
    live = conv_state_indices >= 0
    rows = conv_state_indices[live].long()
    states = conv_state[rows]
    seen = None if cache_seqlens is None else cache_seqlens[live]
    updated = _update(causal_conv1d, x[live], states, weight, bias, activation, seen)
    with torch.no_grad():
        conv_state[rows] = states
    return updated.new_zeros(x.shape).index_put((live,), updated)


def causal_conv1d_update_ref(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`causal_conv1d_update` without `conv_state_indices`, in plain PyTorch."""

    def reference(x, weight, bias, *, activation, initial_state):
        return token_major_ref(x, weight, bias, initial_state, silu=activation is not None)

    return _update(reference, x, conv_state, weight, bias, activation, cache_seqlens)


class CausalConv1dFn:
    """`causal_conv1d_fn` under the published name of its autograd function, for code that calls `apply`."""

    apply = staticmethod(causal_conv1d_fn)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    activation: str | None,
) -> None:
    """Raise for errors that the token-major functions would report in other shapes, or not at all."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected None, 'silu' or 'swish'")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"x must be (batch, dim, seqlen) and weight (dim, width), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if initial_states is not None:
        expected = (x.shape[0], x.shape[1], weight.shape[1] - 1)
        if initial_states.shape != expected:
            raise ValueError(f"initial_states must be {expected}, got {tuple(initial_states.shape)}")
        initial_states = initial_states.transpose(1, 2)
    check_arguments(x.transpose(1, 2), weight, bias, initial_states)


def _within_sequences(
    x_BLD: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor,
    past: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """The convolution of packed sequences in plain PyTorch: every tap is masked where it reaches into another one."""
    batch, seqlen, dim = x_BLD.shape
    width = weight.shape[1]
    compute = torch.promote_types(x_BLD.dtype, torch.float32)
    if past is None:
        past, owner = x_BLD.new_zeros(batch, width - 1, dim), seq_idx.new_full((batch, 1), -1)
    else:
        owner = seq_idx[:, :1]
    inputs = torch.cat([past.to(compute), x_BLD.to(compute)], dim=1)
    owners = torch.cat([owner.expand(batch, width - 1), seq_idx], dim=1)
    out = x_BLD.new_zeros((), dtype=compute) if bias is None else bias.to(compute)
    for tap in range(width):
        here = (owners[:, tap : tap + seqlen] == seq_idx).unsqueeze(-1)
        # `where`, not a product with the mask: a non-finite token must not leak into the next sequence.
        out = out + inputs[:, tap : tap + seqlen].where(here, 0.0) * weight[:, tap].to(compute)
    if activation is not None:
        out = F.silu(out)
    return out.where((seq_idx >= 0).unsqueeze(-1), 0.0).to(x_BLD.dtype)


def _final_states(
    x: torch.Tensor,
    count: int,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """The last `count` inputs (B, D, count) in x's dtype, zeros or initial states where there were fewer."""
    batch, dim, seqlen = x.shape
    kept = min(count, seqlen)
    states = x[..., seqlen - kept :]
    if seq_idx is not None and seqlen:
        states = states.where((seq_idx[:, seqlen - kept :] == seq_idx[:, -1:]).unsqueeze(1), 0.0)
    if kept < count:
        if initial_states is None:
            before = x.new_zeros(batch, dim, count - kept)
        else:
            before = initial_states[..., kept:].to(x.dtype)
            if seq_idx is not None and seqlen:
                before = before.where((seq_idx[:, :1] == seq_idx[:, -1:]).unsqueeze(1), 0.0)
        states = torch.cat([before, states], dim=-1)
    if out is None:
        return states.clone()  # never a view of x: the caller may go on to overwrite it
    check((("x", x, None), ("final_states_out", out, states.shape)))
    return out.copy_(states)


def _update(convolve, x, conv_state, weight, bias, activation, cache_seqlens) -> torch.Tensor:
    """See `causal_conv1d_update`; `convolve` is the token-major function that does the arithmetic."""
    flat = x.dim() == 2
    if flat:
        x = x.unsqueeze(-1)
    _check(x, weight, bias, None, activation)
    batch, dim, seqlen = x.shape
    width, columns = weight.shape[1], conv_state.shape[-1]
    if conv_state.shape != (batch, dim, columns) or columns < width - 1:
        raise ValueError(
            f"conv_state must be ({batch}, {dim}, at least {width - 1}) for width {width}, got "
            f"{tuple(conv_state.shape)}"
        )
    check((("x", x, None), ("conv_state", conv_state, None)))
    check_integers("cache_seqlens", cache_seqlens, (batch,))
    if cache_seqlens is not None and not columns:
        raise ValueError("a circular conv_state needs at least one column, got none")
    # A copy: the state is overwritten below, but backward needs what was in it.
    with torch.no_grad():
        if cache_seqlens is None:
            past = conv_state[..., columns - (width - 1) :].clone()
            if seqlen < columns:
                conv_state.copy_(torch.cat([conv_state[..., seqlen:], x.to(conv_state.dtype)], dim=-1))
            else:
                conv_state.copy_(x[..., seqlen - columns :])
        else:
            seen = cache_seqlens.long().unsqueeze(1)

            def columns_of(first: int, last: int) -> torch.Tensor:
                """(B, D, last - first): columns of tokens first..last-1 counted from the first new one."""
                offsets = torch.arange(first, last, dtype=torch.int64, device=x.device)
                return ((seen + offsets) % columns).unsqueeze(1).expand(-1, dim, -1)

            past = conv_state.gather(2, columns_of(1 - width, 0))
            first = max(0, seqlen - columns)
            conv_state.scatter_(2, columns_of(first, seqlen), x[..., first:].to(conv_state.dtype))
    out = convolve(x.transpose(1, 2), weight, bias, activation=activation, initial_state=past.transpose(1, 2))
    return out.squeeze(1) if flat else out.transpose(1, 2)
