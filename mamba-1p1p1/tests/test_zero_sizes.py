"""Sizes of zero, everywhere: an empty batch or sequence has an empty result, all else is refused in a sentence."""

import pytest
import torch
from causal_conv1d_vim import causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_update
from causal_conv1d_vim.causal_conv1d_interface import causal_conv1d_update_ref
from causal_conv1d_vim.causal_conv1d_varlen import causal_conv1d_varlen_states
from mamba_ssm_vim import Mamba
from mamba_ssm_vim.ops.mixer import Direction, mixer
from mamba_ssm_vim.ops.selective_scan_interface import (
    bimamba_inner_fn,
    mamba_inner_fn,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm_vim.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_ref
from mamba_ssm_vim.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref


def randn(*shape):
    return torch.randn(shape, requires_grad=True)


def run_mixer(batch, dim, seqlen, states, width, rank):
    def direction(reverse):
        return Direction(
            randn(dim, width), randn(dim), randn(rank + 2 * states, dim), randn(dim, rank), randn(dim),
            -torch.rand(dim, states), randn(dim), reverse,
        )  # fmt: skip

    return mixer(randn(batch, seqlen, 2 * dim), [direction(False), direction(True)])


def run_inner(batch, dim, seqlen, states, width, rank, out, both):
    xz, A = randn(batch, 2 * dim, seqlen), -torch.rand(dim, states)
    weights = randn(dim, 1, width), randn(dim), randn(rank + 2 * states, dim), randn(dim, rank), randn(out, dim)
    rest = None, None, randn(dim), randn(dim)
    if both:
        return bimamba_inner_fn(xz, *weights, None, A, A, *rest)
    return mamba_inner_fn(xz, *weights, None, A, *rest)


def run_convolution(function):
    return lambda batch, dim, seqlen, width: function(
        randn(batch, dim, seqlen), randn(dim, width), randn(dim), return_final_states=True
    )


def run_conv_step(function):
    return lambda batch, dim, seqlen, width: function(
        randn(batch, dim, seqlen), torch.zeros(batch, dim, max(width, 1)), randn(dim, width)
    )


def run_scan(function, constant=False):
    def run(batch, dim, seqlen, states):
        B = randn(dim, states) if constant else randn(batch, states, seqlen)
        u, A = randn(batch, dim, seqlen), -torch.rand(dim, states)
        return function(u, u, A, B, B, randn(dim), u, return_last_state=True)

    return run


def run_state_update(function):
    return lambda batch, dim, states: function(
        torch.zeros(batch, dim, states), randn(batch, dim), randn(batch, dim), -torch.rand(dim, states),
        randn(batch, states), randn(batch, states),
    )  # fmt: skip


def run_heads(batch, heads, dim, states, groups):
    x, B = randn(batch, heads, dim), randn(batch, groups, states)
    return selective_state_update(
        torch.zeros(batch, heads, dim, states), x, x, -torch.rand(heads, dim, states), B, B
    )  # fmt: skip


# Each: the function of its sizes, their names, and those that may be zero.
FUNCTIONS = {
    "mixer": (run_mixer, "batch dim seqlen states width rank", "batch seqlen"),
    "mamba_inner_fn": (
        lambda *sizes: run_inner(*sizes, False), "batch dim seqlen states width rank out", "batch seqlen rank out",
    ),
    "bimamba_inner_fn": (
        lambda *sizes: run_inner(*sizes, True), "batch dim seqlen states width rank out", "batch seqlen rank out",
    ),
    "causal_conv1d_fn": (run_convolution(causal_conv1d_fn), "batch dim seqlen width", "batch seqlen"),
    "causal_conv1d_ref": (run_convolution(causal_conv1d_ref), "batch dim seqlen width", "batch seqlen"),
    "causal_conv1d_fn of packed sequences": (
        lambda batch, dim, seqlen, width: causal_conv1d_fn(
            randn(batch, dim, seqlen), randn(dim, width), None, torch.zeros(batch, seqlen, dtype=torch.int32)
        ),
        "batch dim seqlen width", "batch seqlen",
    ),
    "causal_conv1d_update": (run_conv_step(causal_conv1d_update), "batch dim seqlen width", "batch seqlen"),
    "causal_conv1d_update_ref": (run_conv_step(causal_conv1d_update_ref), "batch dim seqlen width", "batch seqlen"),
    "causal_conv1d_update of a circular state": (
        lambda batch, dim, columns: causal_conv1d_update(
            randn(batch, dim), torch.zeros(batch, dim, columns), randn(dim, 1),
            cache_seqlens=torch.zeros(batch, dtype=torch.int32),
        ),
        "batch dim columns", "batch",
    ),
    "causal_conv1d_varlen_states": (
        lambda tokens, dim, kept: causal_conv1d_varlen_states(randn(tokens, dim), torch.tensor([0, tokens]), kept),
        "tokens dim kept", "tokens dim kept",
    ),
    "selective_scan_fn": (run_scan(selective_scan_fn), "batch dim seqlen states", "batch seqlen"),
    "selective_scan_fn of constants": (run_scan(selective_scan_fn, True), "batch dim seqlen states", "batch seqlen"),
    "selective_scan_ref": (run_scan(selective_scan_ref), "batch dim seqlen states", "batch seqlen"),
    "selective_state_update": (run_state_update(selective_state_update), "batch dim states", "batch"),
    "selective_state_update_ref": (run_state_update(selective_state_update_ref), "batch dim states", "batch"),
    "selective_state_update of heads": (run_heads, "batch heads dim states groups", "batch"),
    "layer_norm_fn": (
        lambda rows, tokens, dim: layer_norm_fn(randn(rows, tokens, dim), randn(dim), randn(dim), prenorm=True),
        "rows tokens dim", "rows tokens",
    ),
    "rms_norm_ref": (
        lambda rows, tokens, dim: rms_norm_ref(randn(rows, tokens, dim), randn(dim), None), "rows tokens dim",
        "rows tokens",
    ),
    "RMSNorm": (lambda rows, tokens, dim: RMSNorm(dim)(randn(rows, tokens, dim)), "rows tokens dim", "rows tokens"),
    "Mamba": (
        lambda batch, seqlen, *sizes: Mamba(*sizes, bimamba_type="v2")(randn(batch, seqlen, sizes[0])),
        "batch seqlen d_model d_state d_conv expand dt_rank", "batch seqlen",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [
    (name, size) for name, (_, sizes, _) in FUNCTIONS.items() for size in sizes.split()
])  # fmt: skip
def test_one_size_of_zero(name, size):
    function, sizes, allowed = FUNCTIONS[name]
    values = [0 if s == size else 2 for s in sizes.split()]
    if size not in allowed.split():
        with pytest.raises(ValueError, match=r"\w+ .+ (0|none)") as raised:
            function(*values)
        assert len(str(raised.value).split()) > 4
        return
    results = function(*values)
    results = results if isinstance(results, tuple) else (results,)
    # Empty, or zeros before a sequence without tokens, or the mixer of a step that is its bias alone.
    assert any(r.numel() == 0 for r in results) or size in ("tokens", "rank")
    assert all(r.isfinite().all() for r in results)
    for r in results:
        if r.requires_grad:
            r.sum().backward(retain_graph=True)
