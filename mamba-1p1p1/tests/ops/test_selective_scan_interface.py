"""The published channel-first scan and mixer functions: against naive loops in float64 and complex128."""

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d_vim import causal_conv1d_ref
from closeness import assert_close
from mamba_ssm_vim import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    use_backend,
)
from mamba_ssm_vim.ops.selective_scan_interface import (
    BiMambaInnerFn,
    MambaInnerFn,
    MambaInnerFnNoOutProj,
    SelectiveScanFn,
)

# Relative to the largest entry: some hundred float32 roundings; one rounding of a 16-bit result, or of the 16-bit
# gradient of a 16-bit input (2^-12 and 2^-9), with room for those that are sums of two.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def naive(u, delta, A, B, C, D, z, delta_bias, softplus):
    """The recurrence, one token at a time, in double precision."""
    wide = torch.complex128 if A.is_complex() else torch.float64
    batch, dim, seqlen = u.shape
    u, delta = u.double(), delta.double()
    if delta_bias is not None:
        delta = delta + delta_bias.double()[:, None]
    if softplus:
        delta = F.softplus(delta)

    def at(t, step):
        """(batch, dim, dstate) at one token."""
        if t.dim() == 2:
            return t.to(wide)[None]
        if t.dim() == 3:
            t = t[:, None]
        if A.is_complex():
            t = torch.view_as_complex(t.double().unflatten(-1, (seqlen, 2)).contiguous())
        return t[..., step].to(wide).repeat_interleave(dim // t.shape[1], dim=1)

    state = torch.zeros(batch, dim, A.shape[1], dtype=wide)
    steps = []
    for t in range(seqlen):
        dt = delta[:, :, t, None]
        state = torch.exp(dt * A.to(wide)) * state + dt * at(B, t) * u[:, :, t, None]
        y = (at(C, t) * state).sum(-1)
        steps.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(steps, dim=-1)
    if D is not None:
        y = y + u * D.double()[:, None]
    return (y if z is None else y * F.silu(z.double())), state


def make(form_b, form_c, *, complex_a, dtype=torch.float32, batch=2, dim=6, dstate=5, seqlen=11):
    """u, delta, A, B, C, D, z, delta_bias of a scan; forms: "constant", "variable" or a number of groups."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape, kind=dtype):
        return torch.randn(*shape, generator=g).to(kind)

    def projection(form):
        if form == "constant":
            real = randn(dim, dstate, kind=torch.float32)
            return torch.complex(real, randn(dim, dstate, kind=torch.float32)) if complex_a else real
        columns = 2 * seqlen if complex_a else seqlen
        return randn(batch, dstate, columns) if form == "variable" else randn(batch, form, dstate, columns)

    A = -torch.rand(dim, dstate, generator=g) - 0.1
    if complex_a:
        A = torch.complex(A, randn(dim, dstate, kind=torch.float32))
    delta = torch.rand(batch, dim, seqlen, generator=g).mul(0.5).to(dtype)
    bias = torch.rand(dim, generator=g) * 0.5
    u, z, D = randn(batch, dim, seqlen), randn(batch, dim, seqlen), randn(dim, kind=torch.float32)
    return [u, delta, A, projection(form_b), projection(form_c), D, z, bias]


@pytest.mark.parametrize("complex_a", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize(("form_b", "form_c"), [
    ("constant", "constant"), ("constant", "variable"), ("variable", "constant"), ("variable", "variable"), (2, 2),
    (3, "constant"), (1, 3), ("variable", 2),
])  # fmt: skip
@pytest.mark.parametrize("optional", [False, True])
def test_scan(form_b, form_c, optional, softplus, dtype, complex_a):
    inputs = make(form_b, form_c, complex_a=complex_a, dtype=dtype)
    if not optional:
        inputs[5:] = [None] * 3
    leaves = [[None if t is None else t.clone().requires_grad_() for t in inputs] for _ in range(3)]
    expected, expected_state = naive(*leaves[0], softplus)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(g)
    for function, own in ((selective_scan_fn, leaves[1]), (selective_scan_ref, leaves[2])):
        out, state = function(*own, delta_softplus=softplus, return_last_state=True)
        assert out.dtype == dtype
        assert state.dtype == (torch.complex64 if complex_a else torch.float32)
        assert_close(out, expected, TOLERANCE[dtype])
        assert_close(state, expected_state, TOLERANCE[torch.float32])
        out.backward(g.to(dtype))
        for a, e in zip(own, leaves[0], strict=True):
            if a is not None:
                assert a.grad.dtype == a.dtype
                assert_close(a.grad, e.grad.to(torch.promote_types(e.grad.dtype, torch.float32)), TOLERANCE[dtype])


def test_scan_layouts():
    """Channel-first or channel-last inputs: the same values, and the output laid out like u."""
    inputs = make("variable", "variable", complex_a=False)
    out = selective_scan_fn(*inputs, delta_softplus=True)
    assert out.is_contiguous()
    last = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 3 else t for t in inputs]
    other = selective_scan_fn(*last, delta_softplus=True)
    assert other.transpose(1, 2).is_contiguous()
    assert torch.equal(out, other)
    assert torch.equal(out, SelectiveScanFn.apply(*inputs, True))


def test_scan_errors_speak_channel_first():
    inputs = make("variable", "variable", complex_a=False)
    for index, name in enumerate(("u", "delta", "A", "B", "C")):
        wrong = list(inputs)
        wrong[index] = wrong[index][:-1] if name == "A" else wrong[index][..., :-1]
        with pytest.raises(ValueError, match=rf"\b{name if index > 1 else 'u, delta'}\b.* must"):
            selective_scan_fn(*wrong)


def make_inner(*, complex_a, b=False, c=False, biases=False, dim=10, rank=3, dstate=4, seqlen=13):
    """Arguments of mamba_inner_fn by name."""
    g = torch.Generator().manual_seed(2)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    def in_a(*shape):
        return torch.complex(randn(*shape), randn(*shape)) if complex_a else randn(*shape)

    states = dstate * (2 if complex_a else 1)
    A = -torch.rand(dim, dstate, generator=g) - 0.1
    return {
        "xz": randn(2, 2 * dim, seqlen),
        "conv1d_weight": randn(dim, 1, 3),
        "conv1d_bias": randn(dim),
        "x_proj_weight": randn(rank + states * ((not b) + (not c)), dim) * dim**-0.5,
        "delta_proj_weight": randn(dim, rank) * rank**-0.5,
        "out_proj_weight": randn(7, dim) * dim**-0.5,
        "out_proj_bias": randn(7),
        "A": torch.complex(A, randn(dim, dstate)) if complex_a else A,
        "B": in_a(dim, dstate) if b else None,
        "C": in_a(dim, dstate) if c else None,
        "D": randn(dim),
        "delta_bias": torch.rand(dim, generator=g) - 2,
        "B_proj_bias": randn(states) if biases and not b else None,
        "C_proj_bias": randn(states) if biases and not c else None,
    }


def naive_inner(a, A_b=None):
    """The mixer, written out in channel-first double precision."""
    a = {k: None if t is None else t.to(torch.complex128 if t.is_complex() else torch.float64) for k, t in a.items()}
    x, z = a["xz"].chunk(2, dim=1)
    x = causal_conv1d_ref(x, a["conv1d_weight"][:, 0], a["conv1d_bias"], activation="silu")
    rank = a["delta_proj_weight"].shape[1]
    projected = torch.einsum("rd,bdl->brl", a["x_proj_weight"], x)
    delta = torch.einsum("dr,brl->bdl", a["delta_proj_weight"], projected[:, :rank])
    rest = projected[:, rank:]
    states = a["A"].shape[1] * (2 if a["A"].is_complex() else 1)

    def variable(part, bias):
        part = part if bias is None else part + bias[:, None]
        # (dstate two) rows become (l two) columns.
        return part.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2) if a["A"].is_complex() else part

    B = variable(rest[:, :states], a["B_proj_bias"]) if a["B"] is None else a["B"]
    C = variable(rest[:, -states:], a["C_proj_bias"]) if a["C"] is None else a["C"]
    y, _ = naive(x, delta, a["A"], B, C, a["D"], z, a["delta_bias"], True)
    if A_b is not None:
        flipped = [t if t.dim() == 2 else t.flip(-1) for t in (B, C)]
        y = y + naive(x.flip(-1), delta.flip(-1), A_b, *flipped, a["D"], z.flip(-1), a["delta_bias"], True)[0].flip(-1)
    return y, F.linear(y.transpose(1, 2), a["out_proj_weight"], a["out_proj_bias"])


@pytest.mark.parametrize("complex_a", [False, True])
@pytest.mark.parametrize(
    ("b", "c", "biases"), [(False, False, False), (False, False, True), (True, False, True), (True, True, False)]
)
def test_mamba_inner(b, c, biases, complex_a):
    arguments = make_inner(complex_a=complex_a, b=b, c=c, biases=biases)
    leaves = [{k: None if t is None else t.clone().requires_grad_() for k, t in arguments.items()} for _ in range(2)]
    y, expected = naive_inner(leaves[0])
    out = mamba_inner_fn(**leaves[1])
    assert_close(out, expected, TOLERANCE[torch.float32])
    assert torch.equal(out, mamba_inner_ref(**arguments))
    assert torch.equal(out, MambaInnerFn.apply(*arguments.values()))
    with use_backend("reference"):
        assert_close(mamba_inner_ref(**arguments), expected, TOLERANCE[torch.float32])
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected.backward(g)
    out.backward(g.float())
    for name, leaf in leaves[1].items():
        if leaf is not None:
            assert_close(leaf.grad, leaves[0][name].grad, TOLERANCE[torch.float32])
    inner = {k: t for k, t in arguments.items() if not k.startswith("out_proj")}
    assert_close(mamba_inner_fn_no_out_proj(**inner), y, TOLERANCE[torch.float32])
    assert_close(MambaInnerFnNoOutProj.apply(*inner.values()), y, TOLERANCE[torch.float32])


def test_bimamba_inner():
    arguments = make_inner(complex_a=False)
    A_b = arguments["A"].roll(1, 0)
    _, expected = naive_inner(arguments, A_b.double())
    names = list(arguments)
    values = [arguments[n] for n in names]
    values.insert(names.index("A") + 1, A_b)
    assert_close(bimamba_inner_fn(*values), expected, TOLERANCE[torch.float32])
    assert_close(bimamba_inner_ref(*values), expected, TOLERANCE[torch.float32])
    assert_close(BiMambaInnerFn.apply(*values), expected, TOLERANCE[torch.float32])


def test_inner_under_autocast():
    """The scan runs in xz's dtype; out_proj follows autocast; parameters get gradients in their own dtype."""
    arguments = {k: None if t is None else t.requires_grad_() for k, t in make_inner(complex_a=False).items()}
    exact = mamba_inner_fn(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**{**arguments, "xz": arguments["xz"].bfloat16()})
    assert out.dtype == torch.bfloat16
    # Six bfloat16 tensors on the way, 2^-9 each, of terms that partly cancel.
    assert (out.float() - exact).abs().max() / exact.abs().max() < 0.1
    out.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in arguments.values() if t is not None)


def test_inner_errors():
    arguments = make_inner(complex_a=False)
    with pytest.raises(ValueError, match="x_proj_weight"):
        mamba_inner_fn(**{**arguments, "x_proj_weight": arguments["x_proj_weight"][:-1]})
    with pytest.raises(ValueError, match="B must"):
        mamba_inner_fn(**{**arguments, "x_proj_weight": arguments["x_proj_weight"][:-4], "B": torch.zeros(2, 4, 13)})
