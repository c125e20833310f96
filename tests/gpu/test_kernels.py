"""Every operator of every backend against float64: values, gradients, added results, and the bits of two runs.

`pytest -m gpu` runs Triton and CUDA on a GPU; the same tests run on the CPU's kernels everywhere, so that the tests
themselves are tried too, and under TRITON_INTERPRET=1 `-m gpu` runs Triton's on a CPU.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d_vim.conv import backends as conv_backends
from causal_conv1d_vim.conv import reference as conv_reference
from causal_conv1d_vim.runtime.backend import use_backend
from closeness import assert_close
from gpu_kernels import DTYPES, N, make_directions, mixer_step, rounded, scan_inputs
from mamba_ssm_vim.ops.mixer.op import backends as mixer_backends
from mamba_ssm_vim.ops.norm import add_norm_ref
from mamba_ssm_vim.ops.norm import backends as norm_backends
from mamba_ssm_vim.ops.selective_scan import backends as scan_backends
from mamba_ssm_vim.ops.state_update import selective_state_update, selective_state_update_ref

# Relative error in the norm: float32 sums in another order; one rounding to bfloat16 or float16, with room for the
# tensors whose own rounding is amplified (sums over tokens that cancel).
LIMITS = dict(zip(DTYPES, (2e-5, 6e-3, 1e-3), strict=True))
gpu = functools.partial(pytest.param, marks=pytest.mark.gpu)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_ways = pytest.mark.parametrize("reverse", [False, True])


@pytest.fixture(params=["cpu", gpu("triton"), gpu("cuda")])
def backend(request):
    """A backend forced for the test, on the device that it is for."""
    if request.param == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("sizes for a GPU, which take a CPU long")
    torch.manual_seed(0)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    """Where the backend's tensors lie."""
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"


def module_for(backend, backends, *args):
    """The backend's module, if it serves these arguments."""
    if backend not in backends.names:
        pytest.skip(f"{backend} has no {backends.op}")
    module = backends.module(backend)
    if (reason := module.why_not(*args)) is not None:
        pytest.skip(f"{backend}: {reason}")
    return module


def judge(actual, expected, limit):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is not None:
            assert_close(a, e, limit, f"tensor {index}", in_norm=True, floor=1e-30)


def same_bits(function):
    assert all(a is b or torch.equal(a, b) for a, b in zip(function(), function(), strict=True))


def exact_scan(u, delta, A, B, C, D, z, bias, initial, *, reverse, scale):
    """(out, last state) of the scan in log2(L) steps over whole tensors: differentiable, quick in float64 on a GPU."""
    if reverse:
        u, delta, B, C, z = (t.flip(1) for t in (u, delta, B, C, z))
    dt = F.softplus(delta + bias)
    per_group = u.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(per_group, 2) for t in (B, C))
    decay = torch.exp(dt.unsqueeze(-1) * A)
    state = (dt * u).unsqueeze(-1) * B
    state = torch.cat([state[:, :1] + decay[:, :1] * initial.unsqueeze(1), state[:, 1:]], 1)
    step = 1
    while step < u.shape[1]:
        state = torch.cat([state[:, :step], state[:, step:] + decay[:, step:] * state[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    out = ((state * C).sum(-1) + D * u) * F.silu(z) * scale
    return (out.flip(1) if reverse else out), state[:, -1]


@pytest.mark.parametrize("shape", [
    (1, 9, 20, N, 1), (1, 5, 3, 8, 1), (1, 1, 32, N, 1),  # batch, seqlen, dim, dstate, groups
    gpu((2, 37, 70, N, 1)), gpu((3, 197, 384, N, 1)), gpu((1, 600, 96, N, 2)), gpu((1, 40, 20, 32, 1)),
    gpu((1, 33, 20, 64, 1)), gpu((1, 6085, 64, N, 1)), gpu((40, 197, 384, N, 1)),
])  # fmt: skip
@every_dtype
@both_ways
def test_scan(backend, device, shape, dtype, reverse):
    flags = {"delta_softplus": True, "reverse": reverse, "out_scale": 0.5}
    tensors = scan_inputs(device, *shape, torch.float32)
    narrow = [t.to(dtype) if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(tensors)]
    module = module_for(backend, scan_backends, narrow[0], *narrow[2:5])
    wide = [t.double().requires_grad_() for t in tensors]
    exact = exact_scan(*wide, reverse=reverse, scale=0.5)
    dout, dlast = rounded(device, torch.float32, *exact[0].shape), torch.randn_like(exact[1]).float()
    wanted = torch.autograd.grad(exact, wide, [dout.double(), dlast.double()])
    out, last, saved = module.forward(*narrow, **flags, save=True)
    judge((out, last), exact, LIMITS[dtype])
    backward = functools.partial(module.backward, dout.to(dtype), dlast, *narrow, saved, **flags)
    judge(backward(), wanted, LIMITS[dtype])
    same_bits(backward)
    same_bits(lambda: module.forward(*narrow, **flags)[:2])
    added, _, _ = module.forward(*narrow, **flags, out=out.clone(), accumulate=True)
    judge([added], [2 * out.double()], LIMITS[dtype])


@pytest.mark.parametrize("shape", [
    (1, 9, 20, 4), (1, 2, 7, 4),  # batch, seqlen, dim, width
    gpu((2, 67, 10, 4)), gpu((2, 197, 384, 4)), gpu((1, 130, 258, 3)), gpu((8, 1600, 192, 2)),
])  # fmt: skip
@every_dtype
@both_ways
def test_convolution(backend, device, shape, dtype, reverse):
    batch, seqlen, dim, width = shape
    flags = {"silu": True, "reverse": reverse}
    tensors = [
        rounded(device, torch.float32, batch, seqlen, 2 * dim)[..., dim:],
        torch.randn(dim, width, device=device),
        torch.randn(dim, device=device),
        rounded(device, torch.float32, batch, width - 1, dim),
    ]
    narrow = [t.to(dtype) if i in (0, 3) else t for i, t in enumerate(tensors)]
    module = module_for(backend, conv_backends, *narrow[:2])
    wide = [t.double() for t in tensors]
    dout = rounded(device, torch.float32, batch, seqlen, dim)
    judge([module.forward(*narrow, **flags)], [conv_reference.forward(*wide, **flags)], LIMITS[dtype])
    backward = functools.partial(module.backward, dout.to(dtype), *narrow, **flags)
    judge(backward(), conv_reference.backward(dout.double(), *wide, **flags), LIMITS[dtype])
    same_bits(backward)


@pytest.mark.parametrize("shape", [(3, 40), (5, 7, 384), gpu((2, 197, 192)), gpu((3, 768)), gpu((2, 1000))])
@every_dtype
@pytest.mark.parametrize("rms", [False, True])
def test_norm(backend, device, shape, dtype, rms):
    x = torch.randn(shape, device=device).to(dtype)
    residual, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    module = module_for(backend, norm_backends, x)
    y, total, mean, rstd = module.forward(x, residual, weight, None, eps=1e-5, rms=rms, residual_dtype=torch.float32)
    wide = [t.double().requires_grad_() for t in (x, residual, weight)]
    exact = add_norm_ref(*wide, eps=1e-5, rms=rms)
    judge((y, total), exact, LIMITS[dtype])
    dy, dtotal = torch.randn_like(y), torch.randn_like(total)
    wanted = torch.autograd.grad(exact, wide, [dy.double(), dtotal.double()])
    backward = functools.partial(module.backward, dy, dtotal, total, weight, None, mean, rstd, rms=rms, x_dtype=dtype)
    judge(backward()[:3], wanted, LIMITS[dtype])
    same_bits(backward)


@pytest.mark.parametrize("shape", [(1, 7, 20), gpu((1, 37, 70)), gpu((2, 197, 384)), gpu((1, 600, 96))])
@every_dtype
@pytest.mark.parametrize("v1", [False, True])
def test_mixer(backend, device, shape, dtype, v1):
    """Against the reference backend, since projections round to the type between the kernels of either."""
    batch, seqlen, dim = shape
    both = make_directions(device, dim, 12, v1)
    xz = torch.randn(batch, seqlen, 2 * dim, device=device).to(dtype).requires_grad_()
    dout = torch.randn(batch, seqlen, dim, device=device).to(dtype)
    module_for(backend, mixer_backends, xz, both)
    with use_backend("reference"):
        wanted = [t.double() for t in mixer_step(xz, both, dout)]
    judge(mixer_step(xz, both, dout), wanted, 1e-4 if dtype == torch.float32 else 8 * LIMITS[dtype])
    same_bits(lambda: mixer_step(xz, both, dout))


@pytest.mark.parametrize("heads", [(), (3,)])
@every_dtype
def test_state_update(backend, device, dtype, heads):
    channels, groups = (*heads, 20), () if not heads else (1,)

    def numbers(*size, dtype=torch.float32):
        return torch.randn(size, device=device).to(dtype)

    x, dt, z = (numbers(4, *channels, dtype=dtype) for _ in range(3))
    B, C = (numbers(4, *groups, N, dtype=dtype) for _ in range(2))
    rest = (-numbers(*channels, N).abs(), B, C, numbers(*channels), z, numbers(*channels))
    state = numbers(4, *channels, N)
    if backend == "cuda":
        pytest.skip("the step is left to Triton")
    with torch.no_grad():
        if backend == "triton":
            module_for(backend, conv_backends, x.reshape(4, 1, -1))
        exact, kept = state.double(), state.clone()
        wanted = selective_state_update_ref(exact, *(t.double() for t in (x, dt, *rest)), dt_softplus=True)
        out = selective_state_update(kept, x, dt, *rest, dt_softplus=True)
    judge((out, kept), (wanted, exact), LIMITS[dtype])
