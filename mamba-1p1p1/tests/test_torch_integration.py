"""What torch expects of operators: opcheck, compile, export, autocast, a derivative, and a clear word on the second."""

import pytest
import torch
from causal_conv1d_vim import causal_conv1d, causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_update
from mamba_ssm_vim import (
    BackendError,
    Mamba,
    add_norm,
    selective_scan,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    use_backend,
)
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
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


def mixer_inputs(randn, kind, dtype):
    """xz, the tensors of the directions flat as the registered operator takes them, and their directions."""
    rank = 3
    tensors, reverses = [], [False, True] if kind == "v2" else [False]
    for _ in reverses:
        tensors += [
            randn(DIM, WIDTH), randn(DIM) if kind != "none" else None, randn(rank + 2 * DSTATE, DIM) * 0.3,
            randn(DIM, rank), randn(DIM), -randn(DIM, DSTATE).abs() - 0.1, randn(DIM),
            -randn(DIM, DSTATE).abs() - 0.1 if kind == "v1" else None,
        ]  # fmt: skip
    return randn(BATCH, 37, 2 * DIM, dtype=dtype), tensors, reverses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_opcheck_mixer(randn, kind, dtype):
    xz, tensors, reverses = mixer_inputs(randn, kind, dtype)
    torch.library.opcheck(OPS.mixer.default, (*leaves(xz), leaves(*tensors), reverses, 0.5))
    torch.library.opcheck(OPS.mixer_saving.default, (xz, tensors, reverses, 0.5, "cpu"))
    out, saved = OPS.mixer_saving(xz, tensors, reverses, 0.5, "cpu")
    dout = torch.randn_like(out)
    torch.library.opcheck(OPS.mixer_backward.default, (dout, xz, tensors, saved, reverses, 0.5, "cpu"))


def test_registered_mixer_checks_its_arguments(randn):
    """Anybody can call it, and the kernels read and write bare addresses."""
    xz, tensors, reverses = mixer_inputs(randn, "v2", torch.float32)
    for index, t in enumerate(tensors):
        if t is not None:
            for other in (t[:-1], t.to("meta"), t.to_sparse()):
                with pytest.raises(ValueError, match=r"must be|on one device"):
                    OPS.mixer(xz, [*tensors[:index], other, *tensors[index + 1 :]], reverses, 0.5)
    with pytest.raises(ValueError, match="8 tensors per direction"):
        OPS.mixer(xz, tensors, [False], 0.5)
    with pytest.raises(ValueError, match="x_proj_weight must be a tensor"):
        OPS.mixer(xz, [*tensors[:2], None, *tensors[3:]], reverses, 0.5)
    with pytest.raises(ValueError, match="xz must be"):
        OPS.mixer(xz[0], tensors, reverses, 0.5)
    out, saved = OPS.mixer_saving(xz, tensors, reverses, 0.5, "cpu")
    for wrong in (saved[:-1], [saved[0][:, :-1], *saved[1:]], [saved[0].bfloat16(), *saved[1:]]):
        with pytest.raises(ValueError, match="saved must be"):
            OPS.mixer_backward(out, xz, tensors, wrong, reverses, 0.5, "cpu")
    with pytest.raises(ValueError, match="dout must be"):
        OPS.mixer_backward(out[:1], xz, tensors, saved, reverses, 0.5, "cpu")
    with pytest.raises(BackendError, match="cuda"):
        OPS.mixer_saving(xz, tensors, reverses, 0.5, "cuda")


def registered_names() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in names if name.startswith("vision_mamba::")}


def test_every_operator_is_checked_here():
    """The registered operators are those of the tests above; another one needs its own."""
    forward = {"selective_scan", "causal_conv1d", "add_norm", "mixer"}
    assert registered_names() == forward | {f"{name}_backward" for name in forward} | {"mixer_saving"}


def test_torch_has_no_decompositions_of_the_operators():
    """Inductor refuses an operator of which it has one, wherever the environment variable CI is set."""
    assert not torch._decomp.get_decompositions([getattr(OPS, name).default for name in registered_names()])


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


def graphs_of(compiled_graphs):
    """A backend of torch.compile that runs the graphs as they are and collects their operators."""

    def collect(graph, inputs):
        compiled_graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    return aot_autograd(fw_compiler=collect, bw_compiler=collect)


@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_mixer(kind, dtype):
    """One graph with the fused mixer in it, forward and backward, for any batch and length, and the bits of eager."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mamba, seen = Mamba(24, bimamba_type=kind, dtype=dtype), []
    compiled = torch.compile(mamba, fullgraph=True, dynamic=True, backend=graphs_of(seen))
    for batch, seqlen in ((2, 40), (3, 70)):
        x = torch.randn(batch, seqlen, 24, dtype=dtype)
        gradients = []
        for model in (mamba, compiled):
            mamba.zero_grad()
            own = x.clone().requires_grad_()
            out = model(own)
            out.square().sum().backward()
            gradients.append([out.detach(), own.grad, *(p.grad.clone() for p in mamba.parameters())])
        assert all(torch.equal(a, e) for a, e in zip(*gradients, strict=True))
    operators = [name for graph in seen for name in graph if name.startswith("vision_mamba")]
    assert operators == ["vision_mamba.mixer_saving.default", "vision_mamba.mixer_backward.default"]
    with torch.no_grad():
        assert torch.equal(compiled(x), mamba(x))
    assert [name for name in seen[-1] if name.startswith("vision_mamba")] == ["vision_mamba.mixer.default"]


def test_compiled_mixer_of_operators():
    """What no fused mixer serves, float64 here, is compiled from the operators inside."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mamba, seen = Mamba(24, bimamba_type="v2").double(), []
    compiled = torch.compile(mamba, fullgraph=True, backend=graphs_of(seen))
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), mamba(x))
    compiled(x).sum().backward()
    assert sum(name == "vision_mamba.selective_scan.default" for name in seen[0]) == 2


def test_a_compiled_graph_knows_its_backend():
    """Its saved tensors are those of one backend; another one, forced later, is refused and not ignored."""
    torch._dynamo.reset()
    mamba, x = Mamba(24, bimamba_type="v2"), torch.randn(2, 7, 24)
    compiled = torch.compile(mamba, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    with use_backend("reference"), pytest.raises(BackendError, match="compiled for 'cpu'"):
        compiled(x)
    torch._dynamo.reset()
    with use_backend("reference"):
        again = torch.compile(mamba, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)


def test_compiled_transforms_of_the_mixer():
    torch._dynamo.reset()
    torch.manual_seed(0)
    mamba, x = Mamba(8, d_state=4, bimamba_type="v2"), torch.randn(3, 5, 8)
    parameters = {name: p.detach() for name, p in mamba.named_parameters()}

    def of_sample(parameters, sample):
        return functional_call(mamba, parameters, (sample[None],)).square().sum()

    per_sample = vmap(grad(of_sample), (None, 0))
    for name, value in torch.compile(per_sample, backend="aot_eager")(parameters, x).items():
        expected = per_sample(parameters, x)[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_batched_gradients_of_the_eager_mixer():
    """A recorded eager call whose cotangents come from vmap."""
    torch.manual_seed(0)
    mamba, x = Mamba(8, d_state=4, bimamba_type="v1"), torch.randn(1, 3, 8)
    rows = torch.autograd.functional.jacobian(mamba, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(mamba, x, vectorize=True), rows)


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
