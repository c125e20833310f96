"""What torch expects of operators: opcheck, compile, export, autocast, a derivative, and a clear word on the second."""

import pytest
import torch
from causal_conv1d_vim import causal_conv1d, causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_update
from mamba_ssm_vim import Mamba, add_norm, selective_scan, selective_scan_fn, selective_scan_ref, selective_state_update
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

OPS = torch.ops.vision_mamba
DTYPES = [torch.float32, torch.bfloat16]
BATCH, SEQLEN, DIM, DSTATE, WIDTH = 2, 5, 16, 4, 4


@pytest.fixture
def randn():
    """Normal numbers from one generator."""
    g = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=g).to(dtype)


def leaves(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def scan_inputs(randn, dtype, optional=True):
    """u, delta, A, B, C, D, z, delta_bias, initial_state."""
    u, delta, z = (randn(BATCH, SEQLEN, DIM, dtype=dtype) for _ in range(3))
    B, C = (randn(BATCH, SEQLEN, 1, DSTATE, dtype=dtype) for _ in range(2))
    rest = (randn(DIM), z, randn(DIM), randn(BATCH, DIM, DSTATE)) if optional else (None,) * 4
    return u, delta, -randn(DIM, DSTATE).abs() - 0.1, B, C, *rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_opcheck_scan(randn, reverse, optional, dtype):
    inputs = scan_inputs(randn, dtype, optional)
    torch.library.opcheck(OPS.selective_scan.default, (*leaves(*inputs), True, reverse))
    cotangents = randn(BATCH, SEQLEN, DIM, dtype=dtype), randn(BATCH, DIM, DSTATE)
    torch.library.opcheck(OPS.selective_scan_backward.default, (*cotangents, *inputs, True, reverse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(("reverse", "channel_first"), [(True, False), (False, False), (False, True)])
def test_opcheck_convolution(randn, reverse, channel_first, optional, dtype):
    x, weight = randn(BATCH, SEQLEN, DIM, dtype=dtype), randn(DIM, WIDTH)
    if channel_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    rest = (randn(DIM), randn(BATCH, WIDTH - 1, DIM, dtype=dtype)) if optional else (None, None)
    torch.library.opcheck(OPS.causal_conv1d.default, (*leaves(x, weight, *rest), True, reverse))
    dout = randn(BATCH, SEQLEN, DIM, dtype=dtype)
    torch.library.opcheck(OPS.causal_conv1d_backward.default, (dout, x, weight, *rest, True, reverse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("wide_residual", [True, False])
def test_opcheck_norm(randn, wide_residual, rms, optional, dtype):
    residual_dtype = torch.float32 if wide_residual else dtype
    x, weight = randn(3, DIM, dtype=dtype), randn(DIM)
    residual, bias = (randn(3, DIM), randn(DIM)) if optional else (None, None)
    flags = 1e-5, rms, residual_dtype
    torch.library.opcheck(OPS.add_norm.default, (*leaves(x, residual, weight, bias), *flags))
    _, residual_out, mean, rstd = OPS.add_norm(x, residual, weight, bias, *flags)
    dresidual = randn(3, DIM, dtype=residual_dtype) if optional else None
    arguments = randn(3, DIM, dtype=dtype), dresidual, residual_out, weight, bias, mean, rstd, rms, dtype
    torch.library.opcheck(OPS.add_norm_backward.default, arguments)


def test_every_operator_is_checked_here():
    """The registered operators are those of the three tests above; another one needs its own."""
    registered = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in registered if name.startswith("vision_mamba::")}
    forward = {"selective_scan", "causal_conv1d", "add_norm"}
    assert names == forward | {f"{name}_backward" for name in forward}


def test_registered_operators_are_the_eager_functions(randn):
    """The dispatcher's path, which a compiled graph takes, gives the same bits as the eager one, gradients included."""
    inputs = scan_inputs(randn, torch.float32)
    g = randn(BATCH, SEQLEN, DIM), randn(BATCH, DIM, DSTATE)
    eager, graph = leaves(*inputs), leaves(*inputs)
    u, delta, A, B, C, D, z, bias, state = eager
    outputs = selective_scan(
        u, delta, A, B, C, D, z, bias, delta_softplus=True, initial_state=state, return_last_state=True
    )
    others = OPS.selective_scan(*graph, True, False)
    torch.autograd.backward(outputs, g)
    torch.autograd.backward(others, g)
    pairs = [*zip(outputs, others, strict=True), *((a.grad, b.grad) for a, b in zip(eager, graph, strict=True))]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_compiled_mixer(kind):
    """The whole graph at once, forward and backward, at two lengths, as eager does it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mamba = Mamba(24, bimamba_type=kind)
    compiled = torch.compile(mamba, fullgraph=True, backend="aot_eager")
    for seqlen in (7, 12):
        x = torch.randn(2, seqlen, 24)
        gradients = []
        for model in (mamba, compiled):
            mamba.zero_grad()
            own = x.clone().requires_grad_()
            out = model(own)
            out.square().sum().backward()
            gradients.append([out.detach(), own.grad, *(p.grad.clone() for p in mamba.parameters())])
        for a, e in zip(*gradients[::-1], strict=True):
            # The graph projects the step in float32 as eager does, in another order: some ulps of the largest.
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * e.abs().max().item())


def test_compiled_published_functions(randn):
    """Convolution, scan, and a step of each with its state updated in place, all in one graph."""
    torch._dynamo.reset()

    def function(x, z, weight, A, B, C, state, conv_state):
        x = causal_conv1d_fn(x, weight, activation="silu")
        y = selective_scan_fn(x, x * 0.1, A, B, C, z=z, delta_softplus=True)
        last = causal_conv1d_update(y[..., -1], conv_state, weight, activation="silu")
        return y, selective_state_update(state, last, last, A, B[..., -1], C[..., -1], dt_softplus=True)

    x, z, B, C = randn(2, 8, 9), randn(2, 8, 9), randn(2, 4, 9), randn(2, 4, 9)
    weight, A = randn(8, 4), -randn(8, 4).abs()
    states = [(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4)) for _ in range(2)]
    with torch.no_grad():
        expected = function(x, z, weight, A, B, C, *states[0])
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(x, z, weight, A, B, C, *states[1])
    for a, e in zip([*actual, *states[1]], [*expected, *states[0]], strict=True):
        torch.testing.assert_close(a, e)


def test_exported_mixer():
    """torch.export with a free batch and a free length keeps the operators as single nodes."""
    torch.manual_seed(0)
    mamba = Mamba(24, bimamba_type="v2", if_divide_out=True).eval()
    free = {"hidden_states": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}}
    program = torch.export.export(mamba, (torch.randn(2, 7, 24),), dynamic_shapes=free)
    # Regions without autocast are graphs of their own.
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes]
    assert called.count("vision_mamba.selective_scan.default") == 2
    assert called.count("vision_mamba.causal_conv1d.default") == 2
    x = torch.randn(3, 12, 24)
    torch.testing.assert_close(program.module()(x), mamba(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    """Projections run in autocast's dtype, scans in their input's; parameters and their gradients stay float32."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mamba, x = Mamba(24, bimamba_type="v2"), torch.randn(2, 9, 24)
    exact = mamba(x)
    model = torch.compile(mamba, fullgraph=True, backend="aot_eager") if compiled else mamba
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    # A dozen bfloat16 tensors on the way, 2^-9 each, of terms that partly cancel.
    assert (out.float() - exact).abs().max() / exact.abs().max() < 0.1
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in mamba.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_leave_dtypes_to_the_caller(randn, dtype):
    """Autocast does not touch the operators themselves: what comes in in a dtype goes out in it."""
    inputs = scan_inputs(randn, dtype)
    x = inputs[0]
    with torch.autocast("cpu", torch.float16):
        assert selective_scan(*inputs[:8]).dtype == dtype
        assert causal_conv1d(x, randn(DIM, WIDTH)).dtype == dtype
        y, residual = add_norm(x, randn(BATCH, SEQLEN, DIM), randn(DIM))
    assert (y.dtype, residual.dtype) == (dtype, torch.float32)


def test_fake_tensors_and_dispatch_modes_see_the_operators(randn):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    mamba, x = Mamba(24, bimamba_type="v2"), randn(2, 9, 24)
    with torch.no_grad():
        expected = mamba(x)
        with Mode():
            torch.testing.assert_close(mamba(x), expected, rtol=1e-4, atol=1e-5)
    assert seen.count("vision_mamba.selective_scan.default") == 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mamba(torch.empty(5, 3, 24)).shape == (5, 3, 24)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_traced_operators_are_no_constants(randn):
    mamba = Mamba(24, bimamba_type="v2").eval()
    with torch.no_grad():
        traced = torch.jit.trace(mamba, randn(2, 9, 24))
        x = randn(2, 9, 24)
        torch.testing.assert_close(traced(x), mamba(x), rtol=1e-4, atol=1e-5)


def test_forward_mode_is_refused(randn):
    """There is no formula for it; the tangent must not be lost in silence."""
    x, weight, ones = randn(2, 5, DIM), randn(DIM, WIDTH), torch.ones(DIM)
    A, B = -torch.ones(DIM, DSTATE), randn(2, 5, 1, DSTATE)
    for function in (
        lambda x: causal_conv1d(x, weight),
        lambda x: selective_scan(x, x, A, B, B, delta_softplus=True),
        lambda x: add_norm(x, None, ones)[0],
        Mamba(DIM),
    ):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
            function(forward_ad.make_dual(x, torch.ones_like(x)))


def test_second_derivatives_are_refused(randn):
    x = randn(BATCH, SEQLEN, DIM).requires_grad_()
    weight, ones = randn(DIM, WIDTH), torch.ones(DIM)
    A, B = -torch.ones(DIM, DSTATE), randn(BATCH, SEQLEN, 1, DSTATE)
    mamba = Mamba(DIM)
    for function in (
        lambda: causal_conv1d(x, weight),
        lambda: selective_scan(x, x, A, B, B, delta_softplus=True),
        lambda: add_norm(x, None, ones)[0],
        lambda: mamba(x),
        lambda: causal_conv1d_fn(x, randn(SEQLEN, WIDTH)),
        lambda: selective_scan_fn(x, x, *(-torch.ones(SEQLEN, DSTATE) for _ in range(3))),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(function().square().sum(), x, create_graph=True)


def test_references_have_a_second_derivative(randn):
    x, weight = randn(1, 3, 4).double().requires_grad_(), randn(3, 2).double()
    A, delta = -randn(3, 2).abs().double(), randn(1, 3, 4).abs().double()
    assert torch.autograd.gradgradcheck(lambda x: causal_conv1d_ref(x, weight, activation="silu"), (x,))
    assert torch.autograd.gradgradcheck(lambda x: selective_scan_ref(x, delta, A, weight, weight, z=x), (x,))
