"""Checks of every compiled kernel against the float64 reference, for gpu.py: values, gradients, repeatability."""

import functools
from collections.abc import Callable

import torch
from causal_conv1d_vim.backend import use_backend
from causal_conv1d_vim.conv import backends as conv_backends
from causal_conv1d_vim.conv import reference as conv_reference
from mamba_ssm_vim.ops.mixer import Direction, mixer
from mamba_ssm_vim.ops.norm import add_norm_ref
from mamba_ssm_vim.ops.norm import backends as norm_backends
from mamba_ssm_vim.ops.selective_scan import backends as scan_backends
from mamba_ssm_vim.ops.selective_scan import reference as scan_reference

N = 16
# Relative error in the norm: float32 sums in another order; one rounding to bfloat16 or float16, with room for the
# tensors whose own rounding is amplified (sums over tokens that cancel).
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def available(backends, *args) -> list:
    """(name, module) of the compiled backends that can serve the tensors."""
    found = []
    for name in ("cuda", "triton"):
        if name in backends.names:
            with use_backend(name):
                reason = backends.module(name).why_not(*args)
            if reason is None:
                found.append((name, backends.module(name)))
            else:
                print(f"  {backends.op}: no {name}: {reason}", flush=True)
    return found


def scan_inputs(device, batch, seqlen, dim, dstate, groups, dtype):
    u, delta, z = torch.randn(batch, seqlen, 3 * dim, device=device).to(dtype).split(dim, -1)
    rows = torch.randn(batch, seqlen, 5 + 2 * groups * dstate, device=device).to(dtype)
    B, C = rows[..., 5:].unflatten(-1, (2, groups, dstate)).unbind(2)
    A = -4 * torch.rand(dim, dstate, device=device) - 0.1
    D, bias = torch.randn(dim, device=device), torch.randn(dim, device=device) - 3
    return [u, delta, A, B, C, D, z, bias, torch.randn(batch, dim, dstate, device=device)]


def directions(device, dim: int, rank: int, v1: bool = False) -> list[Direction]:
    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, device=device)

    poles = -torch.arange(1.0, N + 1, device=device).repeat(dim, 1)
    made = [
        Direction(
            normal(dim, 4), normal(dim), normal(rank + 2 * N, dim), normal(dim, rank), normal(dim) - 4, poles.clone(),
            normal(dim), reverse=reverse, A_back=1.5 * poles if v1 else None,
        )
        for reverse in ((False,) if v1 else (False, True))
    ]  # fmt: skip
    for way in made:
        for tensor in vars(way).values():
            if isinstance(tensor, torch.Tensor):
                tensor.requires_grad_()
    return made


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def judge(bench, what: str, actual, expected, limit: float) -> None:
    """Compare tensor by tensor in the relative norm; NaN fails."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is not None and not error(a, e) <= limit:
            bench.failures.append(f"{what}, tensor {index}: error {error(a, e):.1e}, limit {limit:.0e}")
            print("  FAILED " + bench.failures[-1], flush=True)


def same(bench, what: str, function: Callable) -> None:
    """Two runs must agree bit for bit."""
    pairs = zip(function(), function(), strict=True)
    if not all(a is b or torch.equal(a, b) for a, b in pairs):
        bench.failures.append(f"{what}: two runs differ")
        print("  FAILED " + bench.failures[-1], flush=True)


def check_scan(bench, name: str, module, shape, dtype, reverse: bool) -> None:
    tensors = scan_inputs(bench.device, *shape, dtype)
    flags = {"delta_softplus": True, "reverse": reverse, "out_scale": 0.5}
    wide = [t.double() for t in tensors]
    out, last, saved = module.forward(*tensors, **flags, save=True)
    dout, dlast = torch.randn_like(out), torch.randn_like(last)
    what = f"{name} scan {shape} {short(dtype)} reverse={reverse}"
    judge(bench, what, (out, last), scan_reference.forward(*wide, **flags)[:2], LIMITS[dtype])
    wanted = scan_reference.backward(dout.double(), dlast.double(), *wide, [], **flags)
    again = functools.partial(module.backward, dout, dlast, *tensors, saved, **flags)
    judge(bench, what + " gradient", again(), wanted, LIMITS[dtype])
    same(bench, what, again)
    added, _, _ = module.forward(*tensors, **flags, accumulate_into=out.clone())
    judge(bench, what + " accumulated", [added], [2 * out.double()], LIMITS[dtype])


def check_conv(bench, name: str, module, shape, dtype, reverse: bool) -> None:
    batch, seqlen, dim, width = shape
    x = torch.randn(batch, seqlen, 2 * dim, device=bench.device).to(dtype)[..., dim:]
    tensors = [x, torch.randn(dim, width, device=bench.device), torch.randn(dim, device=bench.device),
               torch.randn(batch, width - 1, dim, device=bench.device).to(dtype)]  # fmt: skip
    flags = {"silu": True, "reverse": reverse}
    wide = [t.double() for t in tensors]
    dout = torch.randn(batch, seqlen, dim, device=bench.device).to(dtype)
    what = f"{name} conv {shape} {short(dtype)} reverse={reverse}"
    judge(bench, what, [module.forward(*tensors, **flags)], [conv_reference.forward(*wide, **flags)], LIMITS[dtype])
    wanted = conv_reference.backward(dout.double(), *wide, **flags)
    again = functools.partial(module.backward, dout, *tensors, **flags)
    judge(bench, what + " gradient", again(), wanted, LIMITS[dtype])
    same(bench, what, again)


def check_norm(bench, name: str, module, shape, dtype, rms: bool) -> None:
    x = torch.randn(shape, device=bench.device).to(dtype)
    residual, weight = torch.randn(shape, device=bench.device), torch.randn(shape[-1], device=bench.device)
    what = f"{name} norm {shape} {short(dtype)} rms={rms}"
    y, total, mean, rstd = module.forward(x, residual, weight, None, eps=1e-5, rms=rms, residual_dtype=torch.float32)
    wide = [t.double().requires_grad_() for t in (x, residual, weight)]
    expected = add_norm_ref(*wide, eps=1e-5, rms=rms)
    judge(bench, what, (y, total), expected, LIMITS[dtype])
    dy, dtotal = torch.randn_like(y), torch.randn_like(total)
    wanted = torch.autograd.grad(expected, wide, [dy.double(), dtotal.double()])
    again = functools.partial(module.backward, dy, dtotal, total, weight, None, mean, rstd, rms=rms, x_dtype=dtype)
    judge(bench, what + " gradient", again()[:3], wanted, LIMITS[dtype])
    same(bench, what, again)


def mixer_step(xz: torch.Tensor, ways: list[Direction], dout: torch.Tensor) -> list[torch.Tensor]:
    """Output of the mixer, then the gradients of xz and of every parameter."""
    leaves = [xz, *(t for way in ways for t in vars(way).values() if isinstance(t, torch.Tensor))]
    out = mixer(xz, ways, scale=0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check_mixer(bench, name: str, shape, dtype, v1: bool) -> None:
    batch, seqlen, dim = shape
    ways = directions(bench.device, dim, 12, v1)
    xz = torch.randn(batch, seqlen, 2 * dim, device=bench.device).to(dtype).requires_grad_()
    dout = torch.randn(batch, seqlen, dim, device=bench.device).to(dtype)
    what = f"{name} mixer {shape} {short(dtype)} {'v1' if v1 else 'v2'}"
    with use_backend("reference"):
        # The projections round to dtype between the kernels; the reference rounds there too.
        wanted = [t.double() for t in mixer_step(xz, ways, dout)]
    limit = 1e-4 if dtype == torch.float32 else 8 * LIMITS[dtype]
    with use_backend(name):
        judge(bench, what, mixer_step(xz, ways, dout), wanted, limit)
        if dtype != torch.float32 or not bench.gpu:
            same(bench, what, lambda: mixer_step(xz, ways, dout))


def check(bench) -> None:
    """Every compiled kernel against the reference in float64."""
    tiny, quick = bench.options.tiny, bench.options.quick
    probe = scan_inputs(bench.device, 1, 2, 4, N, 1, torch.float32)
    scans = (
        [(1, 9, 20, N, 1)] if tiny else [(2, 37, 70, N, 1), (3, 197, 384, N, 1), (1, 5, 3, 8, 1), (1, 600, 96, N, 2)]
    )
    scans += [] if tiny or quick else [(1, 40, 20, 32, 1), (1, 33, 20, 64, 1), (1, 1, 32, N, 1)]
    convs = [(1, 9, 20, 4)] if tiny else [(2, 67, 10, 4), (1, 2, 7, 4), (2, 197, 384, 4), (1, 130, 258, 3)]
    norms = [(3, 40)] if tiny else [(2, 197, 192), (5, 7, 384), (3, 768), (2, 1000)]
    mixers = [(1, 7, 20)] if tiny else [(2, 197, 384), (1, 37, 70), (1, 600, 96)]
    dtypes = [torch.float32] if tiny else list(LIMITS)
    jobs = [
        *((check_scan, *m, s, d, r) for m in available(scan_backends, probe[0], *probe[2:5])
          for s in scans for d in dtypes for r in (False, True)),
        *((check_conv, *m, s, d, r) for m in available(conv_backends, probe[0])
          for s in convs for d in dtypes for r in (False, True)),
        *((check_norm, *m, s, d, r) for m in available(norm_backends, probe[0])
          for s in norms for d in dtypes for r in (True, False)),
        *((check_mixer, name, s, d, v1) for name, _ in available(scan_backends, probe[0], *probe[2:5])
          for s in mixers for d in dtypes for v1 in (False, True)),
    ]  # fmt: skip
    done = 0
    for function, *arguments in jobs:
        if not bench.spare():
            break
        try:
            function(bench, *arguments)
        except Exception as problem:
            what = " ".join(str(a) for a in arguments if not hasattr(a, "forward"))
            bench.failures.append(f"{function.__name__} {what}: {type(problem).__name__}: {str(problem)[:300]}")
            print("  FAILED " + bench.failures[-1], flush=True)
        done += 1
    bench.add("check", f"{done} of {len(jobs)} comparisons made, {len(bench.failures)} failures")
