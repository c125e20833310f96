"""Selective scan: the reference against a naive recurrence and gradcheck, every other backend against the reference."""

import itertools

import pytest
import torch
from causal_conv1d_vim.runtime.backend import BackendError
from closeness import assert_close
from mamba_ssm_vim import selective_scan, use_backend
from mamba_ssm_vim.ops.selective_scan import backends, selective_scan_ref

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def runnable() -> list[str]:
    """Backends other than the reference that run on this machine's CPU."""
    u = torch.zeros(1, 2, 16)
    A = -torch.ones(16, 4)
    B = torch.zeros(1, 2, 1, 4)
    names = [n for n in backends.names if n != "reference"]
    return [n for n in names if backends.module(n).why_not(u, A, B, B) is None]


def make(batch, seqlen, dim, dstate, *, groups=1, dtype=torch.float32, constant=False, seed=0, optional=True):
    """Inputs of a scan: steps of 1e-3 to 1e-1 after softplus and decays of every strength, as in a trained model."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    bc_shape = (dim, dstate) if constant else (batch, seqlen, groups, dstate)
    inputs = {
        "u": randn(batch, seqlen, dim).to(dtype),
        "delta": randn(batch, seqlen, dim).mul(0.5).to(dtype),
        "A": -torch.rand(dim, dstate, generator=g) * 4 - 0.1,
        "B": randn(*bc_shape) if constant else randn(*bc_shape).to(dtype),
        "C": randn(*bc_shape) if constant else randn(*bc_shape).to(dtype),
        "D": randn(dim) if optional else None,
        "z": randn(batch, seqlen, dim).to(dtype) if optional else None,
        "delta_bias": randn(dim) - 3 if optional else None,
        "initial_state": randn(batch, dim, dstate) if optional else None,
    }
    return [inputs[name] for name in NAMES]


def positive_steps(inputs):
    """The same inputs with steps fit to be taken without softplus: a negative step makes the recurrence explode."""
    return [t if k not in (1, 7) or t is None else t.abs() * 0.1 for k, t in enumerate(inputs)]


def call(inputs, backend, *, reverse=False, softplus=True, cotangents=None):
    """(out, last_state, gradients) of one backend on copies of the inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    u, delta, A, B, C, D, z, bias, state = leaves
    with use_backend(backend):
        out, last = selective_scan(
            u, delta, A, B, C, D, z, bias, delta_softplus=softplus, initial_state=state, return_last_state=True,
            reverse=reverse,
        )  # fmt: skip
        if cotangents is None:
            g = torch.Generator().manual_seed(1)
            cotangents = torch.randn(out.shape, generator=g).to(out), torch.randn(last.shape, generator=g).to(last)
        torch.autograd.backward((out, last), cotangents)
    return out.detach(), last.detach(), [None if t is None else t.grad for t in leaves]


def tolerance(dtype: torch.dtype) -> float:
    """Relative error allowed on the scale of a tensor's largest value.

    float32: about 1000 steps of rounding 2^-24 each, with an exponential of 2 ulp, stay below 2e-4 of the largest.
    bfloat16 and float16 outputs are rounded once (2^-9, 2^-12), and gradients that flow through rounded inputs twice.
    """
    return {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def compare(inputs, backend, dtype=torch.float32, **flags):
    expected, actual = call(inputs, "reference", **flags), call(inputs, backend, **flags)
    assert_close(actual[0], expected[0], tolerance(dtype), "out")
    assert_close(actual[1], expected[1], tolerance(dtype), "last_state")
    for name, a, e in zip(NAMES, actual[2], expected[2], strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert_close(a, e, tolerance(dtype), f"gradient of {name}")


def test_reference_is_the_recurrence():
    u, delta, A, B, C, D, z, bias, h = [t.double() for t in make(1, 3, 2, 2)]
    out, last = selective_scan_ref(u, delta, A, B, C, D, z, bias, h, delta_softplus=True)
    for e in range(2):
        state = h[0, e].clone()
        for t in range(3):
            dt = torch.log1p(torch.exp(delta[0, t, e] + bias[e]))
            state = torch.exp(dt * A[e]) * state + dt * B[0, t, 0] * u[0, t, e]
            y = (C[0, t, 0] * state).sum() + D[e] * u[0, t, e]
            torch.testing.assert_close(out[0, t, e], y * z[0, t, e] * torch.sigmoid(z[0, t, e]))
        torch.testing.assert_close(last[0, e], state)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("form", ["variable", "constant", "groups", "complex"])
def test_reference_gradcheck(form, softplus, reverse):
    inputs = make(2, 4, 4, 3, groups=2 if form == "groups" else 1, constant=form == "constant")
    inputs = [t.double() for t in (inputs if softplus else positive_steps(inputs))]
    if form == "complex":
        for k in (2, 3, 4, 8):
            inputs[k] = torch.complex(inputs[k], inputs[k].roll(1, -1))
    leaves = [t.requires_grad_() for t in inputs]

    def function(u, delta, A, B, C, D, z, bias, state):
        return selective_scan(
            u, delta, A, B, C, D, z, bias, delta_softplus=softplus, initial_state=state, return_last_state=True,
            reverse=reverse,
        )  # fmt: skip

    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("seqlen", "batch", "dim", "dstate"), [
    (1, 1, 16, 16), (2, 3, 7, 4), (3, 2, 33, 1), (17, 1, 50, 16), (197, 2, 40, 16), (64, 1, 24, 64), (65, 2, 5, 3),
    pytest.param(730, 1, 48, 16, marks=pytest.mark.slow), pytest.param(1023, 2, 19, 8, marks=pytest.mark.slow),
    pytest.param(33, 1, 17, 256, marks=pytest.mark.slow),
])  # fmt: skip
def test_shapes(seqlen, batch, dim, dstate, reverse, backend):
    compare(make(batch, seqlen, dim, dstate), backend, reverse=reverse)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_dtypes(dtype, reverse, backend):
    compare(make(2, 67, 24, 16, dtype=dtype), backend, dtype, reverse=reverse)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize(("constant", "groups", "optional", "softplus"), [
    (True, 1, True, True), (False, 2, True, True), (False, 1, False, True), (False, 1, True, False),
    (False, 1, False, False),
])  # fmt: skip
def test_options(constant, groups, optional, softplus, backend):
    inputs = make(2, 21, 12, 8, constant=constant, groups=groups, optional=optional)
    compare(inputs if softplus else positive_steps(inputs), backend, softplus=softplus)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (2, 0)])
def test_empty(batch, seqlen, backend):
    compare(make(batch, seqlen, 16, 4), backend)


@pytest.mark.parametrize("backend", runnable())
def test_column_slices(backend):
    """u, z and B, C may be columns of wider tensors, and other strides give the same as contiguous ones."""
    inputs = make(2, 19, 16, 4)
    expected = call(inputs, backend)
    sliced = list(inputs)
    for k in (0, 1, 6):
        sliced[k] = torch.cat([inputs[k], inputs[k]], dim=2)[..., 16:]
    for k in (3, 4):
        sliced[k] = torch.cat([inputs[k], inputs[k]], dim=3)[..., 4:]
    channel_first = [
        t.transpose(1, 2).contiguous().transpose(1, 2) if k in (0, 1, 6) else t for k, t in enumerate(inputs)
    ]
    for other in (sliced, channel_first):
        u, delta, A, B, C, D, z, bias, state = other
        with use_backend(backend):
            out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, initial_state=state)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", runnable())
def test_same_bits(backend):
    inputs = make(2, 130, 48, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, threads):
            torch.set_num_threads(count)
            out, last, grads = call(inputs, backend)
            results.append([out, last, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", runnable())
def test_writes_every_element(backend):
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        compare(make(2, 37, 21, 5), backend)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_propagates(value, backend):
    inputs = make(1, 9, 16, 4, optional=False)
    for k in (0, 1):
        changed = [None if t is None else t.clone() for t in inputs]
        changed[k][0, 4, 3] = value
        with use_backend("reference"):
            expected = selective_scan(*changed[:5], delta_softplus=True)
        with use_backend(backend):
            actual = selective_scan(*changed[:5], delta_softplus=True)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_complex_is_declined_with_a_reason():
    inputs = make(1, 3, 4, 2, optional=False)
    for k in (2, 3, 4):
        inputs[k] = inputs[k].to(torch.complex64)
    out = selective_scan(*inputs[:5], delta_softplus=True)
    assert not out.is_complex()
    for backend in runnable():
        with use_backend(backend), pytest.raises(BackendError, match="complex"):
            selective_scan(*inputs[:5])


def test_double_backward_says_so():
    u, *rest = make(1, 3, 16, 2)
    u.requires_grad_()
    out = selective_scan(u, *rest[:7], delta_softplus=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), u, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("wrong", NAMES[1:])
def test_wrong_shapes_are_named(wrong):
    """Kernels get bare addresses: a wrong shape must not reach them."""
    inputs = dict(zip(NAMES, make(2, 5, 8, 4), strict=True))
    inputs[wrong] = inputs[wrong][..., :-1]
    state = inputs.pop("initial_state")
    with pytest.raises(ValueError, match=wrong):
        selective_scan(*inputs.values(), initial_state=state)


def test_mixed_devices_and_dtypes_are_named():
    inputs = dict(zip(NAMES[:8], make(2, 5, 8, 4), strict=False))
    for name in NAMES[1:8]:
        with pytest.raises(ValueError, match=f"{name} on meta"):
            selective_scan(**{**inputs, name: inputs[name].to("meta")})
    for name in ("delta", "z"):
        with pytest.raises(ValueError, match=f"u and {name} must both be float64"):
            selective_scan(**{**inputs, name: inputs[name].double()})
    # A float64 A, B or C is no mistake: the reference serves it.
    expected = selective_scan(**inputs, delta_softplus=True)
    for name in ("A", "B", "C"):
        actual = selective_scan(**{**inputs, name: inputs[name].double()}, delta_softplus=True)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("optional", "reverse"), list(itertools.product([True, False], [True, False])))
def test_opcheck(optional, reverse):
    inputs = [None if t is None else t.requires_grad_() for t in make(2, 5, 16, 4, optional=optional)]
    torch.library.opcheck(torch.ops.vision_mamba.selective_scan.default, (*inputs, True, reverse))
