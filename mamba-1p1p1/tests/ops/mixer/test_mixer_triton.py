"""The mixer on the Triton kernels in Triton's interpreter (or on a GPU), against the reference operators."""

import pytest
import torch
from causal_conv1d_vim import triton_support
from causal_conv1d_vim.backend import use_backend
from mamba_ssm_vim.ops.mixer import Direction, mixer, triton
from mamba_ssm_vim.ops.selective_scan import triton as scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_support.interpreting(), reason="test_triton_suite.py runs this under the interpreter"
)


def directions(dim, rank, dstate, *, kind):
    def normal(*shape):
        return (0.5 * torch.randn(shape, device=DEVICE)).requires_grad_()

    def poles():
        return (-4 * torch.rand(dim, dstate, device=DEVICE)).requires_grad_()

    return [
        Direction(
            normal(dim, 4), normal(dim), normal(rank + 2 * dstate, dim), normal(dim, rank), normal(dim), poles(),
            normal(dim), reverse=reverse, A_back=poles() if kind == "v1" else None,
        )
        for reverse in ((False, True) if kind == "v2" else (False,))
    ]  # fmt: skip


def outputs(xz, ways, dout):
    leaves = [xz, *(t for way in ways for t in vars(way).values() if isinstance(t, torch.Tensor))]
    out = mixer(xz, ways, scale=0.5)
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
    torch.manual_seed(0)
    batch, seqlen, dim = 1, 31 if chunked else 5, 12
    if chunked:
        monkeypatch.setattr(scan, "MIN_CHUNK", 8)
        monkeypatch.setattr(triton_support, "multiprocessors", lambda x: 4)
    ways = directions(dim, 3, 4, kind=kind)
    xz = torch.randn(batch, seqlen, 2 * dim, device=DEVICE).to(dtype).requires_grad_()
    dout = torch.randn(batch, seqlen, dim, device=DEVICE).to(dtype)
    with use_backend("reference"):
        expected = outputs(xz, ways, dout)
    with use_backend("triton"):
        actual = outputs(xz, ways, dout)
        assert triton.why_not(xz, ways) is None
    # Float32: sums of a few hundred terms in another order, through four matrix products: 1e-5 in the norm. Bfloat16:
    # intermediate results are rounded to 2^-9 at each of about ten places, and sums over tokens cancel.
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert ((a.double() - e.double()).norm() / e.double().norm()).item() < limit, index
