"""The Triton scan in Triton's interpreter (or on a GPU), against the reference in float64."""

import functools

import pytest
import torch
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.backend import use_backend
from closeness import assert_close
from mamba_ssm_vim.ops.selective_scan import reference, selective_scan
from mamba_ssm_vim.ops.selective_scan import triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_runtime.interpreting(), reason="test_triton_suite.py runs this under the interpreter"
)
# The largest relative error of one rounding; Triton's interpreter cuts the last bits of a bfloat16 off.
ROUNDING = {
    torch.float32: 0.0,
    torch.bfloat16: 2**-7 if triton_runtime.interpreting() else 2**-8,
    torch.float16: 2**-11,
}
NAMES = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial_state")


def numbers(seed=0):
    """`torch.randn` on the device with a generator of its own."""
    return functools.partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def inputs(batch, seqlen, dim, dstate, groups, dtype, *, full=True):
    randn = numbers(seqlen * dim + dstate)
    wide = randn(batch, seqlen, 3 * dim).to(dtype)
    u, delta, z = wide.split(dim, -1)  # column slices, as in xz
    states = randn(batch, seqlen, 2 * groups * dstate + 3).to(dtype)[..., 3:]
    B, C = (t.unflatten(-1, (groups, dstate)) for t in states.chunk(2, -1))
    A = -4 * randn(dim, dstate).sigmoid()
    D, bias = randn(2, dim)
    initial = randn(batch, dim, dstate)
    return [u, delta, A, B, C, *((D, z, bias, initial) if full else (None,) * 4)]


def compare(args, dtype, *, reverse, softplus=True, scale=0.5):
    # Float32 sums of at most a few hundred terms in another order: 4e-6 in the norm, with room for exp2's 2 ulp.
    # Inputs are the same numbers on both sides and the kernels' arithmetic is float32, so a narrow dtype adds the
    # rounding of the results, which in the norm is at most that of an element.
    limit = ROUNDING[dtype] + 4e-6
    flags = {"delta_softplus": softplus, "reverse": reverse, "out_scale": scale}
    wide = [None if t is None else t.double() for t in args]
    out, last, saved = backend.forward(*args, **flags, save=True)
    expected, expected_last, _ = reference.forward(*wide, **flags)
    assert out.dtype == dtype
    assert_close(out, expected, limit, in_norm=True)
    assert_close(last, expected_last, 4e-6, in_norm=True)
    randn = numbers(1)
    dout, dlast = randn(out.shape).to(dtype), randn(last.shape)
    grads = backend.backward(dout, dlast, *args, saved, **flags)
    wanted = reference.backward(dout.double(), dlast.double(), *wide, [], **flags)
    for name, grad, want, source in zip(NAMES, grads, wanted, args, strict=True):
        if source is None:
            assert grad is None, name
        else:
            assert grad.dtype == source.dtype, name
            assert_close(grad, want, limit, name, in_norm=True)
    again = backend.backward(dout, dlast, *args, saved, **flags)
    assert all(a is b or torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@runs
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 11, 40, 16, 1), torch.float32),  # a block and a quarter, an odd length
        ((1, 7, 12, 5, 2), torch.float32),  # states that are no power of two, groups
        ((1, 5, 33, 16, 1), torch.bfloat16),
        ((1, 1, 3, 1, 1), torch.float32),
        pytest.param((1, 8, 32, 16, 1), torch.float16, marks=pytest.mark.slow),
        pytest.param((1, 3, 4, 64, 1), torch.float32, marks=pytest.mark.slow),
    ],
)
def test_matches_reference(shape, dtype, reverse):
    compare(inputs(*shape, dtype), dtype, reverse=reverse)


@runs
def test_only_what_is_given():
    args = inputs(1, 5, 8, 4, 1, torch.float32, full=False)
    args[1] = args[1].abs()  # a negative step would let the state grow, and rounding errors with it
    compare(args, torch.float32, reverse=True, softplus=False, scale=1.0)


@runs
@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_chunked(reverse, monkeypatch):
    monkeypatch.setattr(backend, "MIN_CHUNK", 10)
    monkeypatch.setattr(triton_runtime, "multiprocessors", lambda x: 4)
    args = inputs(1, 43, 20, 16, 1, torch.float32)
    assert backend._plan(*args[:1], args[2], args[3]).chunks == 3
    compare(args, torch.float32, reverse=reverse)


@runs
def test_accumulates_in_place():
    args = inputs(1, 6, 10, 4, 1, torch.float32)
    flags = {"delta_softplus": True, "reverse": False}
    base = numbers(1)(1, 6, 10)
    alone, _, _ = backend.forward(*args, **flags)
    onto = base.clone()
    added, _, _ = backend.forward(*args, **flags, out=onto, accumulate=True)
    assert added is onto
    torch.testing.assert_close(added, base + alone, rtol=1e-6, atol=1e-6)


@runs
def test_through_autograd():
    args = [t.clone().requires_grad_() for t in inputs(1, 5, 6, 3, 1, torch.float32)]
    u, delta, A, B, C, D, z, bias, h0 = args
    with use_backend("triton"):
        out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, initial_state=h0, reverse=True)
    out.sum().backward()
    grads = [t.grad.clone() for t in args]
    for t in args:
        t.grad = None
    with use_backend("reference"):
        out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, initial_state=h0, reverse=True)
    out.sum().backward()
    for mine, t in zip(grads, args, strict=True):
        assert_close(mine, t.grad.double(), 4e-6, in_norm=True)


def test_plan():
    image = backend.plan(128, 197, 384, 16, 1, 132)
    assert (image.chunks, image.blocks, image.chunk_len) == (1, 12, 200)
    long = backend.plan(1, 6085, 384, 16, 1, 132)
    assert long.chunks * long.blocks >= 4 * 132
    assert long.chunks * long.chunk_len >= 6085 > (long.chunks - 1) * long.chunk_len
    assert long.chunk_len % long.grad_tile == long.grad_tile % long.tile == 0
    assert backend.plan(2, 10, 96, 3, 3, 132).states == 4


def test_declines_with_a_reason():
    args = [torch.zeros(1, 2, 4), -torch.ones(4, 2), torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)]
    assert "on cpu" in backend.why_not(*args)
    assert "complex" in backend.why_not(args[0], args[1].cfloat(), *args[2:])
    assert "65 states" in backend.why_not(args[0], torch.ones(4, 65), *args[2:])
    assert "constant" in backend.why_not(*args[:2], torch.ones(4, 2), args[3])
