"""The CUDA mixer, its kernels run on the CPU through the tests' emulation of CUDA, against the operators one by one."""

import dataclasses

import pytest
import torch
from causal_conv1d_vim.runtime.backend import use_backend
from cuda_testing import CONV_SOURCES, MAMBA_SOURCES, emulate
from mamba_ssm_vim.ops.mixer import Direction, cuda, mixer, op


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The backend module with both libraries compiled for the CPU, chosen for every mixer call."""
    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        emulate(cuda.conv.library, CONV_SOURCES, folder, patch)
        emulate(cuda.scan.library, MAMBA_SOURCES, folder, patch)
        yield cuda


def direction(dim: int, dstate: int, rank: int, *, reverse: bool) -> Direction:
    """A direction with leaf parameters of usual sizes."""
    shapes = {
        "conv_weight": (dim, 4), "conv_bias": (dim,), "x_proj_weight": (rank + 2 * dstate, dim),
        "dt_proj_weight": (dim, rank), "dt_bias": (dim,), "D": (dim,),
    }  # fmt: skip
    tensors = {name: (torch.randn(shape) * 0.3).requires_grad_() for name, shape in shapes.items()}
    A = (-torch.rand(dim, dstate) * 4 - 0.1).requires_grad_()
    return Direction(A=A, reverse=reverse, **tensors)


def run(module, monkeypatch, xz, directions, scale):
    """Output and all gradients through the fused module, or through the reference operators if it is None."""
    monkeypatch.setattr(op.backends, "fused", lambda *args: module)
    leaves = [xz, *(t for d in directions for t in vars(d).values() if isinstance(t, torch.Tensor))]
    with use_backend(None if module else "reference"):
        out = mixer(xz, directions, scale=scale)
        return [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("seqlen", "dim"), [(37, 10), (20, 7)])
def test_matches_the_operators(emulated, monkeypatch, seqlen, dim, count):
    torch.manual_seed(0)
    xz = torch.randn(2, seqlen, 2 * dim, requires_grad=True)
    directions = [direction(dim, 16, 3, reverse=i == 1) for i in range(count)]
    actual = run(emulated, monkeypatch, xz, directions, 0.5)
    expected = run(None, monkeypatch, xz, directions, 0.5)
    for a, e in zip(actual, expected, strict=True):
        # Both sides in float32, sums of a few thousand terms in different orders.
        torch.testing.assert_close(a, e, rtol=1e-4, atol=2e-5 * e.abs().max().item())


def test_inference_matches_training(emulated, monkeypatch):
    torch.manual_seed(1)
    xz = torch.randn(1, 33, 12)
    directions = [direction(6, 8, 2, reverse=i == 1) for i in range(2)]
    monkeypatch.setattr(op.backends, "fused", lambda *args: emulated)
    trained = mixer(xz, directions)
    _, saved = emulated.forward(xz, directions, scale=1.0, save=True)
    assert [(t.shape, t.dtype) for t in saved] == emulated.saved_shapes(xz, directions)
    with torch.no_grad():
        assert torch.equal(mixer(xz, directions), trained.detach())


def test_compiled_graph_is_the_eager_mixer(emulated, monkeypatch):
    """The shapes that the backend says it saves carry a graph from its forward to its backward, for any batch."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    monkeypatch.setattr(emulated, "why_not", lambda *args: None)
    monkeypatch.setattr(op.backends, "fused", lambda *args: emulated)
    directions = [direction(6, 8, 2, reverse=i == 1) for i in range(2)]
    compiled = torch.compile(lambda xz: mixer(xz, directions, scale=0.5), backend="aot_eager", fullgraph=True)
    for batch in (2, 3):
        xz = torch.randn(batch, 33, 12, requires_grad=True)
        leaves = [xz, *(t for d in directions for t in vars(d).values() if isinstance(t, torch.Tensor))]
        for a, e in zip(
            *([out, *torch.autograd.grad(out.square().sum(), leaves)]
              for out in (compiled(xz), mixer(xz, directions, scale=0.5))),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, e)


def test_bfloat16_stays_near_float32(emulated, monkeypatch):
    torch.manual_seed(2)
    xz = torch.randn(1, 40, 16, requires_grad=True)
    directions = [direction(8, 16, 2, reverse=i == 1) for i in range(2)]
    exact = run(None, monkeypatch, xz, directions, 0.5)
    rounded = run(emulated, monkeypatch, xz.detach().bfloat16().requires_grad_(), directions, 0.5)
    for a, e in zip(rounded, exact, strict=True):
        # About ten roundings of relative size 2^-9 lie between input and gradient; they add up as a norm.
        assert (a.float() - e).norm() <= 0.04 * e.norm()


def test_declines_what_it_cannot_do(monkeypatch):
    xz = torch.zeros(1, 4, 12)
    one = direction(6, 8, 2, reverse=False)
    assert "not on a CUDA device" in cuda.why_not(xz, [one])
    for library in (cuda.conv.library, cuda.scan.library):
        monkeypatch.setattr(library, "why_not", lambda x: None)
    assert cuda.why_not(xz, [one]) is None
    assert cuda.why_not(xz, [one, dataclasses.replace(one, reverse=True)]) is None
    assert "same way" in cuda.why_not(xz, [one, one])
    assert "3 directions" in cuda.why_not(xz, [one] * 3)
    assert "v1" in cuda.why_not(xz, [dataclasses.replace(one, A_back=one.A)])
    assert "width is 5" in cuda.why_not(xz, [dataclasses.replace(one, conv_weight=torch.zeros(6, 5))])
