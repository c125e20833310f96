"""Results do not depend on `torch.set_default_dtype` or `torch.set_default_device`: every buffer states its own."""

import contextlib

import pytest
import torch
from causal_conv1d_vim import causal_conv1d, causal_conv1d_fn, causal_conv1d_update
from causal_conv1d_vim.causal_conv1d_varlen import causal_conv1d_varlen_states
from causal_conv1d_vim.runtime.backend import use_backend
from mamba_ssm_vim import Mamba, add_norm, selective_scan, selective_scan_fn, selective_state_update
from mamba_ssm_vim.ops.mixer import Direction, mixer
from mamba_ssm_vim.ops.triton.layer_norm import rms_norm_fn

DIM, SEQLEN, N, W = 20, 37, 4, 4
DEFAULTS = [torch.bfloat16, torch.float16, torch.float64, "meta"]


@contextlib.contextmanager
def default(kind):
    """A default dtype, or the default device `meta`: a buffer that ends up there cannot hold results."""
    if kind == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def randn(*shape, seed, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype).requires_grad_()


def tokens(seed, dtype, *shape):
    return randn(2, SEQLEN, *(shape or (DIM,)), seed=seed, dtype=dtype)


def scan(dtype):
    A = -torch.rand(DIM, N, dtype=torch.float32, device="cpu", generator=torch.Generator("cpu").manual_seed(1))
    inputs = [
        tokens(2, dtype), tokens(3, dtype), A.requires_grad_(), tokens(4, dtype, 1, N), tokens(5, dtype, 1, N),
        randn(DIM, seed=6), tokens(7, dtype), randn(DIM, seed=8),
    ]  # fmt: skip
    state = randn(2, DIM, N, seed=9)
    return inputs, state


def run_scan(dtype):
    inputs, state = scan(dtype)
    return selective_scan(*inputs, delta_softplus=True, initial_state=state, return_last_state=True), [*inputs, state]


def run_published_scan(dtype):
    (u, delta, A, B, C, D, z, bias), _ = scan(dtype)
    inputs = [u.transpose(1, 2), delta.transpose(1, 2), A, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D,
              z.transpose(1, 2), bias]  # fmt: skip
    return [selective_scan_fn(*inputs, delta_softplus=True)], [u, delta, A, B, C, D, z, bias]


def run_conv(dtype):
    inputs = [tokens(1, dtype), randn(DIM, W, seed=2), randn(DIM, seed=3), randn(2, W - 1, DIM, seed=4)]
    out = causal_conv1d(*inputs[:3], activation="silu", initial_state=inputs[3], reverse=True)
    return [out], inputs


def run_published_conv(dtype):
    x, weight = tokens(1, dtype), randn(DIM, W, seed=2)
    seq_idx = torch.arange(SEQLEN, dtype=torch.int64, device="cpu").div(7, rounding_mode="floor").expand(2, -1)
    return [causal_conv1d_fn(x.transpose(1, 2), weight), causal_conv1d_fn(x.transpose(1, 2), weight, None, seq_idx)], [
        x,
        weight,
    ]


def run_norm(dtype, rms=True):
    inputs = [tokens(1, dtype), tokens(2, torch.float32), randn(DIM, seed=3), randn(DIM, seed=4)]
    return add_norm(*inputs, rms=rms), inputs


def run_published_norm(dtype):
    torch.manual_seed(0)
    x, residual, weight = tokens(1, dtype), tokens(2, torch.float32), randn(DIM, seed=3)
    return rms_norm_fn(x, weight, None, residual, dropout_p=0.5, prenorm=True), [x, residual, weight]


def run_mixer(dtype, v1=False):
    def parameters(seed, reverse):
        A = (-(randn(DIM, N, seed=seed).detach().abs()) - 0.1).requires_grad_()
        A_back = (A.detach() * 2).requires_grad_() if v1 else None
        return Direction(
            randn(DIM, W, seed=seed + 1), randn(DIM, seed=seed + 2), randn(2 + 2 * N, DIM, seed=seed + 3),
            randn(DIM, 2, seed=seed + 4), randn(DIM, seed=seed + 5), A, randn(DIM, seed=seed + 6), reverse, A_back,
        )  # fmt: skip

    xz, directions = tokens(1, dtype, 2 * DIM), [parameters(10, False), *([] if v1 else [parameters(20, True)])]
    leaves = [t for d in directions for t in vars(d).values() if isinstance(t, torch.Tensor)]
    return [mixer(xz, directions, scale=0.5)], [xz, *leaves]


def run_steps(dtype):
    x, dt = randn(2, DIM, seed=1, dtype=dtype), randn(2, DIM, seed=2, dtype=dtype)
    A, B, C = randn(DIM, N, seed=3), randn(2, N, seed=4, dtype=dtype), randn(2, N, seed=5, dtype=dtype)
    state, conv_state = (randn(2, DIM, k, seed=6).detach() for k in (N, W))
    weight, seen = randn(DIM, W, seed=7), torch.tensor([3, 9], dtype=torch.int32, device="cpu")
    out = causal_conv1d_update(x, conv_state, weight, activation="silu", cache_seqlens=seen)
    y = selective_state_update(state, out, dt, A, B, C, dt_softplus=True)
    last = causal_conv1d_varlen_states(y, torch.tensor([0, 1, 2], dtype=torch.int32, device="cpu"), 3)
    return [out, y, last], [x, dt, A, B, C, weight]


RUNS = {
    "scan": run_scan,
    "published scan": run_published_scan,
    "convolution": run_conv,
    "published convolution": run_published_conv,
    "rms norm": run_norm,
    "layer norm": lambda dtype: run_norm(dtype, rms=False),
    "published norm": run_published_norm,
    "mixer": run_mixer,
    "mixer v1": lambda dtype: run_mixer(dtype, v1=True),
    "steps": run_steps,
}


def results(run, dtype, kind):
    """Outputs and gradients, as tuples of plain tensors."""
    with default(kind):
        outputs, leaves = run(dtype)
        loss = sum(o.float().square().sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_operators_do_not_depend_on_the_defaults(name, dtype, kind, backend):
    with use_backend(backend):
        expected = results(RUNS[name], dtype, torch.float32)
        actual = results(RUNS[name], dtype, kind)
    assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", DEFAULTS[:3], ids=str)
def test_module_does_not_depend_on_the_default_dtype(kind):
    """A module of a stated dtype is built, runs and learns alike; without one its weights have the default."""
    made = []
    for dtype in (torch.float32, kind):
        torch.manual_seed(0)
        with default(dtype):
            module = Mamba(24, bimamba_type="v2", init_layer_scale=0.5, dtype=torch.float32)
            out = module(randn(2, 9, 24, seed=1))
            out.square().sum().backward()
        made.append([out, *module.parameters(), *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    with default(kind):
        module = Mamba(24)
    kinds = {name: p.dtype for name, p in module.named_parameters()}
    assert kinds["in_proj.weight"] == kind
    assert kinds["A_log"] == kinds["D"] == torch.float32
