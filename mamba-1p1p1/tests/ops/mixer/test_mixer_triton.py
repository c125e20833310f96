"""The mixer on the Triton kernels in Triton's interpreter (or on a GPU), against the reference operators."""

import functools

import pytest
import torch
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.backend import use_backend
from mamba_ssm_vim.ops.mixer import Direction, mixer, triton
from mamba_ssm_vim.ops.selective_scan import triton as scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_runtime.interpreting(), reason="test_triton_suite.py runs this under the interpreter"
)


def make_directions(randn, dim, rank, dstate, *, kind):
    def normal(*shape):
        return (0.5 * randn(shape)).requires_grad_()

    def make_A():
        return (-4 * randn(dim, dstate).sigmoid()).requires_grad_()

    return [
        Direction(
            normal(dim, 4), normal(dim), normal(rank + 2 * dstate, dim), normal(dim, rank), normal(dim), make_A(),
            normal(dim), reverse=reverse, A_back=make_A() if kind == "v1" else None,
        )
        for reverse in ((False, True) if kind == "v2" else (False,))
    ]  # fmt: skip


def outputs(xz, directions, dout):
    leaves = [xz, *(t for direction in directions for t in vars(direction).values() if isinstance(t, torch.Tensor))]
    out = mixer(xz, directions, scale=0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize(
    ("kind", "chunked", "dtype"),
    [
        ("v2", False, torch.float32),
        ("v1", False, torch.float32),
        pytest.param("none", False, torch.float32, marks=pytest.mark.slow),
        pytest.param("v2", True, torch.float32, marks=pytest.mark.slow),
        pytest.param("v2", False, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_matches_the_reference_operators(kind, chunked, dtype, monkeypatch):
    randn = functools.partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    batch, seqlen, dim = 1, 31 if chunked else 5, 12
    if chunked:
        monkeypatch.setattr(scan, "MIN_CHUNK", 8)
        monkeypatch.setattr(triton_runtime, "multiprocessors", lambda x: 4)
    directions = make_directions(randn, dim, 3, 4, kind=kind)
    xz = randn(batch, seqlen, 2 * dim).to(dtype).requires_grad_()
    dout = randn(batch, seqlen, dim).to(dtype)
    with use_backend("reference"):
        expected = outputs(xz, directions, dout)
    with use_backend("triton"):
        actual = outputs(xz, directions, dout)
        assert triton.why_not(xz, directions) is None
        _, saved = triton.forward(xz.detach(), directions, scale=0.5, save=True)
    assert [(t.shape, t.dtype) for t in saved] == triton.saved_shapes(xz, directions)
    # Float32: sums of a few hundred terms in another order, through four matrix products: 1e-5 in the norm. Bfloat16:
    # results are rounded at about ten places on either side, by up to 2^-7 in the interpreter (it cuts bits off); as
    # independent errors of half of that they come to 2^-8 * sqrt(20) = 0.017, and sums over tokens cancel.
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert ((a.double() - e.double()).norm() / e.double().norm()).item() < limit, index
