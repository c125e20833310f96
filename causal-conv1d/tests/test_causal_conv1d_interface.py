"""The published channel-first functions: against naive loops, across layouts, packed sequences against single ones."""

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d_vim import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
)
from causal_conv1d_vim.causal_conv1d_interface import CausalConv1dFn
from causal_conv1d_vim.causal_conv1d_varlen import causal_conv1d_varlen_states_ref
from closeness import assert_close

# One rounding of the result: 2^-24, 2^-12, 2^-9 relative, on sums of four products of order one; gradients of weight
# and bias sum up to 300 such terms in float32.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_x(batch, dim, seqlen, channel_last, dtype=torch.float32):
    """(batch, dim, seqlen) as a slice of something wider, in either layout."""
    if channel_last:
        return randn(batch, seqlen, dim + 9, dtype=dtype)[..., 5 : 5 + dim].transpose(1, 2)
    return randn(batch, dim + 9, seqlen, dtype=dtype)[:, 5 : 5 + dim]


def naive(x, weight, bias, past, silu):
    """Token by token in float64."""
    x, weight, past = x.double(), weight.double(), past.double()
    padded = torch.cat([past, x], dim=-1)
    width = weight.shape[1]
    steps = [(padded[..., t : t + width] * weight).sum(-1) for t in range(x.shape[-1])]
    out = torch.stack(steps, dim=-1)
    out = out if bias is None else out + bias.double().unsqueeze(-1)
    return F.silu(out) if silu else out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("width", "seqlen"), [(2, 1), (2, 70), (3, 2), (3, 129), (4, 1), (4, 2), (4, 65)])
def test_states_and_layouts(width, seqlen, with_bias, silu, channel_last, dtype):
    batch, dim = 2, 21
    x = make_x(batch, dim, seqlen, channel_last, dtype)
    weight, bias = randn(dim, width, seed=1), randn(dim, seed=2) if with_bias else None
    past = randn(batch, width - 1, dim, seed=3, dtype=dtype).transpose(1, 2)
    activation = "silu" if silu else None
    expected_states = torch.cat([past, x], dim=-1)[..., -(width - 1) :]
    for function in (causal_conv1d_fn, causal_conv1d_ref):
        out, states = function(x, weight, bias, initial_states=past, return_final_states=True, activation=activation)
        assert out.dtype == dtype
        assert_close(out, naive(x, weight, bias, past, silu), TOLERANCE[dtype], floor=1.0)
        assert torch.equal(states, expected_states)
        zeros = torch.zeros_like(past)
        assert_close(
            function(x, weight, bias, activation=activation),
            naive(x, weight, bias, zeros, silu),
            TOLERANCE[dtype],
            floor=1.0,
        )
        given = torch.empty(batch, dim, width - 1, dtype=dtype)
        _, returned = function(x, weight, bias, return_final_states=True, final_states_out=given)
        assert returned.data_ptr() == given.data_ptr()
        assert torch.equal(given, torch.cat([zeros, x], dim=-1)[..., -(width - 1) :])


@pytest.mark.parametrize("channel_last", [False, True])
def test_layout_of_the_output(channel_last):
    x = make_x(2, 12, 20, channel_last)
    out = causal_conv1d_fn(x, randn(12, 4))
    assert out.transpose(1, 2).is_contiguous() if channel_last else out.is_contiguous()


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize(("width", "seqlen"), [(4, 2), (3, 50)])
def test_gradients_flow_through_output_and_states(width, seqlen, channel_last):
    leaves = [make_x(2, 19, seqlen, channel_last), randn(19, width, seed=1), randn(19, seed=2)]
    leaves.append(randn(2, 19, width - 1, seed=3))
    results = []
    for function, cast in ((causal_conv1d_fn, torch.float32), (naive, torch.float64)):
        x, weight, bias, past = [t.detach().to(cast).requires_grad_() for t in leaves]
        if function is naive:
            out, states = naive(x, weight, bias, past, True), torch.cat([past, x], dim=-1)[..., -(width - 1) :]
        else:
            out, states = function(x, weight, bias, initial_states=past, return_final_states=True, activation="silu")
            out += states.sum()  # in place, as the output of an ordinary operator allows
            out = out - states.sum()
        loss = (out * randn(*out.shape, seed=4)).sum() + (states * randn(*states.shape, seed=5)).sum()
        results.append(torch.autograd.grad(loss, (x, weight, bias, past)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, TOLERANCE[torch.float32], floor=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_packed_sequences_are_separate_ones(width, silu, dtype):
    lengths = [[1, 2, 5, 13], [19, 1, 1]]
    dim, activation = 11, "silu" if silu else None
    weight, bias = randn(dim, width, seed=1), randn(dim, seed=2)
    leaves = [make_x(2, dim, 21, True, dtype).detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    packed = causal_conv1d_fn(*leaves, seq_idx=seq_idx.int(), activation=activation)
    x = leaves[0]
    separate = torch.stack([
        torch.cat([causal_conv1d_fn(s[None], *leaves[1:], activation=activation)[0] for s in row.split(n, -1)], -1)
        for row, n in zip(x, lengths, strict=True)
    ])  # fmt: skip
    assert_close(packed, separate, TOLERANCE[dtype], floor=1.0)
    g = randn(*packed.shape, seed=3, dtype=dtype)
    for a, e in zip(torch.autograd.grad(packed, leaves, g), torch.autograd.grad(separate, leaves, g), strict=True):
        assert_close(a, e, TOLERANCE[dtype], floor=1.0)


def test_padding_is_zero_and_silent():
    x, weight, bias = make_x(1, 6, 8, False), randn(6, 3, seed=1), randn(6, seed=2)
    seq_idx = torch.tensor([[0, 0, 0, 4, 4, -1, -1, -1]])
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    assert torch.equal(out[..., 5:], torch.zeros(1, 6, 3))
    poisoned = x.clone()
    poisoned[..., 2] = float("nan")
    assert torch.equal(causal_conv1d_fn(poisoned, weight, bias, seq_idx, activation="silu")[..., 3:], out[..., 3:])


def test_states_of_packed_sequences():
    """Initial states continue the first sequence of a row; the final ones are the last sequence's."""
    x, weight, past = make_x(2, 5, 6, False), randn(5, 4, seed=1), randn(2, 5, 3, seed=2)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]])
    out, states = causal_conv1d_fn(x, weight, None, seq_idx, past, return_final_states=True)
    torch.testing.assert_close(out[1], causal_conv1d_ref(x, weight, None, past)[1])
    torch.testing.assert_close(out[0, :, :2], causal_conv1d_ref(x[..., :2], weight, None, past)[0])
    torch.testing.assert_close(out[0, :, 2:5], causal_conv1d_ref(x[..., 2:5], weight)[0])
    assert torch.equal(states[0], torch.cat([torch.zeros(5, 2), x[0, :, 5:]], dim=-1))
    assert torch.equal(states[1], x[1, :, 3:])


def test_older_argument_order():
    """Up to release 1.1 the fourth argument was the activation."""
    x, weight, bias = make_x(2, 8, 10, False), randn(8, 4, seed=1), randn(8, seed=2)
    expected = causal_conv1d_fn(x, weight, bias, activation="silu")
    assert torch.equal(causal_conv1d_fn(x, weight, bias, "silu"), expected)
    assert torch.equal(CausalConv1dFn.apply(x, weight, bias, "swish"), expected)
    assert torch.equal(
        causal_conv1d_ref(x, weight, bias, "silu"), causal_conv1d_ref(x, weight, bias, activation="silu")
    )


@pytest.mark.parametrize("function", [causal_conv1d_update, causal_conv1d_update_ref])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(
    ("width", "columns", "step"), [(4, 3, 1), (4, 4, 1), (2, 9, 3), (3, 2, 5), (4, 7, 7), (4, 5, 11)]
)
def test_updates_continue_the_sequence(width, columns, step, circular, dtype, function):
    """Token by token, or a few at a time, gives what the whole sequence gives."""
    batch, dim, seqlen = 3, 10, 4 * step
    x = randn(batch, dim, seqlen, dtype=dtype)
    weight, bias = randn(dim, width, seed=1), randn(dim, seed=2)
    zeros = torch.zeros(batch, dim, width - 1)
    expected = naive(x, weight, bias, zeros, True)
    state = torch.zeros(batch, dim, columns, dtype=dtype)
    for start in range(0, seqlen, step):
        seen = torch.full((batch,), start, dtype=torch.int32) if circular else None
        piece = x[..., start : start + step]
        if step == 1:
            piece = piece.squeeze(-1)
        out = function(piece, state, weight, bias, "silu", seen)
        assert out.shape == piece.shape
        assert_close(out.view(batch, dim, step), expected[..., start : start + step], TOLERANCE[dtype], floor=1.0)
    kept = torch.cat([torch.zeros(batch, dim, columns, dtype=dtype), x], dim=-1)[..., -columns:]
    if circular:  # token t lies in column t mod columns
        tokens = torch.arange(seqlen - columns, seqlen)
        kept = torch.zeros_like(kept).index_copy(2, tokens % columns, kept)
    assert torch.equal(state, kept)


def test_update_of_chosen_rows():
    state = randn(6, 8, 4)
    before, x, weight = state.clone(), randn(3, 8, seed=1), randn(8, 4, seed=2)
    rows = torch.tensor([4, -1, 1], dtype=torch.int32)
    seen = torch.tensor([5, 6, 7], dtype=torch.int32)
    out = causal_conv1d_update(x, state, weight, cache_seqlens=seen, conv_state_indices=rows)
    chosen = before[[4, 1]]
    expected = causal_conv1d_update_ref(x[[0, 2]], chosen, weight, cache_seqlens=seen[[0, 2]])
    torch.testing.assert_close(out[[0, 2]], expected)
    assert torch.equal(out[1], torch.zeros(8))
    assert torch.equal(state[[4, 1]], chosen)
    assert torch.equal(state[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_update_is_differentiable_but_its_state_is_data():
    x, weight = randn(2, 8).requires_grad_(), randn(8, 4, seed=1).requires_grad_()
    state = randn(2, 8, 4, seed=2)
    out = causal_conv1d_update(x, state, weight, activation="silu")
    out.sum().backward()
    assert not state.requires_grad
    assert x.grad.abs().sum() > 0
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("function", [causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref])
def test_varlen_states(function):
    x = randn(9, 5)
    states = function(x, torch.tensor([0, 2, 8, 9]), 4)
    assert states.shape == (3, 5, 4)
    assert torch.equal(states[0], F.pad(x[:2].t(), (2, 0)))
    assert torch.equal(states[1], x[4:8].t())
    assert torch.equal(states[2], F.pad(x[8:].t(), (3, 0)))


def test_bad_arguments_are_named():
    x, weight, state = randn(2, 8, 5), randn(8, 4), randn(2, 8, 4)
    for what, call in {
        "activation": lambda: causal_conv1d_fn(x, weight, activation="relu"),
        "weight": lambda: causal_conv1d_ref(x, weight[:-1]),
        "initial_states": lambda: causal_conv1d_fn(x, weight, initial_states=state),
        "seq_idx": lambda: causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 4)),
        "conv_state must": lambda: causal_conv1d_update(x, state[..., :2], weight),
        "cache_seqlens": lambda: causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(3)),
        "conv_state_indices": lambda: causal_conv1d_update(x, state, weight, conv_state_indices=torch.zeros(3)),
    }.items():
        with pytest.raises(ValueError, match=what):
            call()
