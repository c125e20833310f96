"""Residual add and norm: the reference against torch's own norms and gradcheck, every other backend against it."""

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm_vim import RMSNorm, add_norm, layer_norm_fn, use_backend
from mamba_ssm_vim.ops.norm import backends


def runnable() -> list[str]:
    """Backends other than the reference that run on this machine's CPU."""
    x = torch.zeros(2, 16)
    return [n for n in backends.names if n != "reference" and backends.module(n).why_not(x) is None]


def make(shape, dtype=torch.float32, residual=True, bias=True):
    """x, residual, weight, bias."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=g).to(dtype)
    r = torch.randn(*shape, generator=g) if residual else None
    return x, r, torch.randn(shape[-1], generator=g), torch.randn(shape[-1], generator=g) if bias else None


def call(inputs, backend, *, rms):
    """[y, residual, gradients...] of one backend on copies of the inputs."""
    x, r, weight, bias = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    with use_backend(backend):
        y, out = add_norm(x, r, weight, bias, rms=rms, residual_dtype=torch.float32)
        g = torch.Generator().manual_seed(1)
        torch.autograd.backward(
            (y, out), (torch.randn(y.shape, generator=g).to(y), torch.randn(out.shape, generator=g))
        )
    return [y.detach(), out.detach(), x.grad, *(None if t is None else t.grad for t in (r, weight, bias))]


@pytest.mark.parametrize("rms", [True, False])
def test_reference_is_torchs_norm(rms):
    x, r, weight, bias = make((3, 5, 7))
    y, out = add_norm(x, r, weight, bias, rms=rms)
    total = x + r
    expected = F.rms_norm(total, (7,), weight, 1e-5) + bias if rms else F.layer_norm(total, (7,), weight, bias, 1e-5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(out, total)


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_reference_gradcheck(rms, residual):
    inputs = [None if t is None else t.double().requires_grad_() for t in make((2, 3, 5), residual=residual)]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: add_norm(*t, rms=rms), inputs)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize(("residual", "bias"), [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 197, 192), (5, 50), (0, 16), (2, 3, 1023)])
def test_backends(shape, dtype, residual, bias, rms, backend):
    inputs = make(shape, dtype, residual, bias)
    # float32: sums of up to 1023 terms, 1e-6 relative; weights' gradients sum the rows. 16-bit: one rounding.
    limit = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for k, (a, e) in enumerate(zip(call(inputs, backend, rms=rms), call(inputs, "reference", rms=rms), strict=True)):
        assert (a is None) == (e is None), k
        if a is not None and e.numel():
            assert a.dtype == e.dtype, k
            # LayerNorm of one channel is zero with an infinite slope's rounding: nothing to compare but finiteness.
            if shape == (1, 1) and not rms:
                assert torch.isfinite(a).all()
                continue
            assert (a.float() - e.float()).abs().max() / e.float().abs().max().clamp(min=1e-3) <= limit, k


def test_published_signatures():
    x, r, weight, bias = make((2, 3, 8))
    y, out = layer_norm_fn(x, weight, bias, residual=r, prenorm=True, residual_in_fp32=True)
    torch.testing.assert_close(y, F.layer_norm(x + r, (8,), weight, bias, 1e-6))
    assert out.dtype == torch.float32
    assert RMSNorm(8)(x).shape == x.shape


def test_bad_arguments_are_named():
    x, r, weight, bias = make((3, 8))
    for what, call in {
        "weight must": lambda: add_norm(x, r, weight[:-1]),
        "residual": lambda: add_norm(x, r[:1], weight),
        "bias must": lambda: add_norm(x, r, weight, bias[:-1]),
        "bias on meta": lambda: add_norm(x, r, weight, bias.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=what):
            call()


def test_opcheck():
    x, r, weight, bias = [t.requires_grad_() for t in make((2, 3, 16))]
    torch.library.opcheck(torch.ops.vision_mamba.add_norm.default, (x, r, weight, bias, 1e-5, False, torch.float32))
    torch.library.opcheck(torch.ops.vision_mamba.add_norm.default, (x, None, weight, None, 1e-5, True, torch.float32))
