"""Causal convolution: the reference against torch's conv1d and gradcheck, every other backend against the reference."""

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d_vim import BackendError, causal_conv1d, use_backend
from causal_conv1d_vim.conv import backends, causal_conv1d_ref


def runnable() -> list[str]:
    """Backends other than the reference that run on this machine's CPU."""
    x = torch.zeros(1, 2, 16)
    return [n for n in backends.names if n != "reference" and backends.module(n).why_not(x) is None]


def make(batch, seqlen, dim, width, dtype=torch.float32, state=True):
    """x, weight, bias, initial_state."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, seqlen, dim, generator=g).to(dtype)
    weight, bias = torch.randn(dim, width, generator=g).to(dtype), torch.randn(dim, generator=g).to(dtype)
    return x, weight, bias, torch.randn(batch, width - 1, dim, generator=g).to(dtype) if state else None


def call(inputs, backend, *, activation, reverse):
    """[out, gradients...] of one backend on copies of the inputs."""
    x, weight, bias, state = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    with use_backend(backend):
        out = causal_conv1d(x, weight, bias, activation=activation, initial_state=state, reverse=reverse)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    return [out.detach(), x.grad, weight.grad, bias.grad, None if state is None else state.grad]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_reference_is_conv1d(width):
    x, weight, bias, _ = make(2, 9, 5, width)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (width - 1, 0)), weight.unsqueeze(1), bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d_ref(x, weight, bias), expected)
    flipped = causal_conv1d_ref(x.flip(1), weight, bias, silu=True).flip(1)
    torch.testing.assert_close(causal_conv1d_ref(x, weight, bias, silu=True, reverse=True), flipped)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_reference_gradcheck(activation, reverse):
    inputs = [t.double().requires_grad_() for t in make(2, 5, 3, 4)]

    def function(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, activation=activation, initial_state=state, reverse=reverse)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("seqlen", "batch", "dim", "width", "state"), [
    (1, 1, 16, 4, True), (2, 3, 7, 4, False), (3, 2, 33, 2, True), (197, 2, 40, 4, False), (1023, 1, 19, 3, True),
    (0, 2, 16, 4, False), (5, 0, 16, 4, True),
])  # fmt: skip
def test_backends(seqlen, batch, dim, width, state, dtype, activation, reverse, backend):
    inputs = make(batch, seqlen, dim, width, dtype, state)
    expected = call(inputs, "reference", activation=activation, reverse=reverse)
    actual = call(inputs, backend, activation=activation, reverse=reverse)
    # Four products: float32 rounds to some 1e-6; the gradients of weight and bias sum batch * seqlen terms. The
    # 16-bit results are rounded once, to 2^-9 and 2^-12 relative.
    limit = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for name, a, e in zip(("out", "dx", "dweight", "dbias", "dstate"), actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None and e.numel():
            scale = e.float().abs().max().clamp(min=1e-3)
            assert (a.float() - e.float()).abs().max() / scale <= limit, name


@pytest.mark.parametrize("backend", runnable())
def test_same_bits(backend):
    inputs = make(2, 300, 48, 4)
    first, second = (call(inputs, backend, activation="silu", reverse=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_arguments_are_named():
    x, weight, bias, _ = make(1, 4, 8, 4)
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d(x, weight[:-1], bias)
    with pytest.raises(ValueError, match="bias"):
        causal_conv1d(x, weight, bias[:-1])
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv1d(x, weight, bias, initial_state=torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="weight on meta"):
        causal_conv1d(x, weight.to("meta"), bias)


def test_opcheck():
    inputs = [t.requires_grad_() for t in make(2, 6, 16, 4)]
    torch.library.opcheck(torch.ops.vision_mamba.causal_conv1d.default, (*inputs, True, False))


def test_too_wide_a_kernel_is_served_by_the_reference(caplog):
    """No compiled backend takes 17 taps: the reference does, and the log says why; a forced backend refuses."""
    x, weight, bias, _ = make(2, 30, 8, 17)
    with caplog.at_level("WARNING", "vision_mamba.backend"):
        out = causal_conv1d(x, weight, bias)
    torch.testing.assert_close(out, causal_conv1d_ref(x, weight, bias))
    x.requires_grad_()
    causal_conv1d(x, weight, bias).sum().backward()
    assert x.grad is not None
    if "cpu" in runnable():
        assert any("the width is 17" in message for message in caplog.messages)
    for backend in runnable():
        with use_backend(backend), pytest.raises(BackendError, match="the width is 17"):
            causal_conv1d(x, weight, bias)
