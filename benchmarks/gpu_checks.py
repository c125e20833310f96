"""Checks of every compiled kernel against float64 arithmetic, for gpu.py: values, gradients, repeatability.

    python benchmarks/gpu_checks.py [--size small|Ti] [--dtype bfloat16]

runs every CUDA kernel once and compares nothing: what compute-sanitizer (small) and ncu (Ti) want to look at.
"""

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from causal_conv1d_vim.conv import backends as conv_backends
from causal_conv1d_vim.conv import reference as conv_reference
from causal_conv1d_vim.runtime.backend import use_backend
from mamba_ssm_vim.ops.mixer import Direction, mixer
from mamba_ssm_vim.ops.norm import add_norm_ref
from mamba_ssm_vim.ops.norm import backends as norm_backends
from mamba_ssm_vim.ops.selective_scan import backends as scan_backends

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


def rounded(device, dtype, *shape):
    """Random numbers that bfloat16 holds, so that every dtype computes with the same ones."""
    return torch.randn(shape, device=device).bfloat16().to(dtype)


def scan_inputs(device, batch, seqlen, dim, dstate, groups, dtype):
    """Column slices of wider tensors, as the mixer passes them; all numbers are bfloat16's, whatever the dtype."""
    u, delta, z = rounded(device, dtype, batch, seqlen, 3 * dim).split(dim, -1)
    before = 16 if dim % 32 == 0 else 5  # columns for the step: rows that start on multiples of 16 bytes, or anywhere
    rows = rounded(device, dtype, batch, seqlen, before + 2 * groups * dstate)
    B, C = rows[..., before:].unflatten(-1, (2, groups, dstate)).unbind(2)
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
        bench.judged += e is not None
        if e is not None and not error(a, e) <= limit:
            bench.failures.append(f"{what}, tensor {index}: error {error(a, e):.1e}, limit {limit:.0e}")
            print("  FAILED " + bench.failures[-1], flush=True)


def same(bench, what: str, function: Callable) -> None:
    """Two runs must agree bit for bit."""
    pairs = zip(function(), function(), strict=True)
    if not all(a is b or torch.equal(a, b) for a, b in pairs):
        bench.failures.append(f"{what}: two runs differ")
        print("  FAILED " + bench.failures[-1], flush=True)


def exact_scan(u, delta, A, B, C, D, z, bias, initial, *, reverse: bool, scale: float):
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


def check_scan(bench, modules, shape, dtypes, reverse: bool) -> None:
    flags = {"delta_softplus": True, "reverse": reverse, "out_scale": 0.5}
    tensors = scan_inputs(bench.device, *shape, torch.float32)
    wide = [t.double().requires_grad_() for t in tensors]
    exact = exact_scan(*wide, reverse=reverse, scale=0.5)
    dout, dlast = rounded(bench.device, torch.float32, *exact[0].shape), torch.randn_like(exact[1]).float()
    wanted = torch.autograd.grad(exact, wide, [dout.double(), dlast.double()])
    for (name, module), dtype in ((m, d) for m in modules for d in dtypes):
        what = f"{name} scan {shape} {short(dtype)} reverse={reverse}"
        narrow = [t.to(dtype) if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(tensors)]
        out, last, saved = module.forward(*narrow, **flags, save=True)
        judge(bench, what, (out, last), exact, LIMITS[dtype])
        again = functools.partial(module.backward, dout.to(dtype), dlast, *narrow, saved, **flags)
        judge(bench, what + " gradient", again(), wanted, LIMITS[dtype])
        same(bench, what + " gradient", again)
        same(bench, what, lambda m=module, t=narrow: m.forward(*t, **flags)[:2])
        added, _, _ = module.forward(*narrow, **flags, out=out.clone(), accumulate=True)
        judge(bench, what + " accumulated", [added], [2 * out.double()], LIMITS[dtype])


def check_conv(bench, modules, shape, dtypes, reverse: bool) -> None:
    batch, seqlen, dim, width = shape
    flags = {"silu": True, "reverse": reverse}
    tensors = [rounded(bench.device, torch.float32, batch, seqlen, 2 * dim)[..., dim:],
               torch.randn(dim, width, device=bench.device), torch.randn(dim, device=bench.device),
               rounded(bench.device, torch.float32, batch, width - 1, dim)]  # fmt: skip
    wide = [t.double() for t in tensors]
    dout = rounded(bench.device, torch.float32, batch, seqlen, dim)
    exact = conv_reference.forward(*wide, **flags)
    wanted = conv_reference.backward(dout.double(), *wide, **flags)
    for (name, module), dtype in ((m, d) for m in modules for d in dtypes):
        what = f"{name} conv {shape} {short(dtype)} reverse={reverse}"
        narrow = [t.to(dtype) if i in (0, 3) else t for i, t in enumerate(tensors)]
        judge(bench, what, [module.forward(*narrow, **flags)], [exact], LIMITS[dtype])
        again = functools.partial(module.backward, dout.to(dtype), *narrow, **flags)
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
        same(bench, what, lambda: mixer_step(xz, ways, dout))


def check(bench) -> None:
    """Every compiled kernel against float64 arithmetic, and two runs against each other."""
    tiny, quick = bench.options.tiny, bench.options.quick
    probe = scan_inputs(bench.device, 1, 2, 4, N, 1, torch.float32)
    scans = (
        [(1, 9, 20, N, 1)] if tiny else [(2, 37, 70, N, 1), (3, 197, 384, N, 1), (1, 5, 3, 8, 1), (1, 600, 96, N, 2)]
    )
    scans += [] if tiny else [(1, 40, 20, 32, 1), (1, 33, 20, 64, 1), (1, 1, 32, N, 1)]
    scans += [] if tiny or quick else [(1, 6085, 64, N, 1), (40, 197, 384, N, 1)]
    convs = [(1, 9, 20, 4)] if tiny else [(2, 67, 10, 4), (1, 2, 7, 4), (2, 197, 384, 4), (1, 130, 258, 3)]
    norms = [(3, 40)] if tiny else [(2, 197, 192), (5, 7, 384), (3, 768), (2, 1000)]
    mixers = [(1, 7, 20)] if tiny else [(2, 197, 384), (1, 37, 70), (1, 600, 96)]
    dtypes = [torch.float32] if tiny else list(LIMITS)
    scanners = available(scan_backends, probe[0], *probe[2:5])
    convolvers = available(conv_backends, probe[0])
    jobs = [
        *((check_scan, scanners, s, dtypes, r) for s in scans for r in (False, True)),
        *((check_conv, convolvers, s, dtypes, r) for s in convs for r in (False, True)),
        *((check_norm, *m, s, d, r) for m in available(norm_backends, probe[0])
          for s in norms for d in dtypes for r in (True, False)),
        *((check_mixer, name, s, d, v1) for name, _ in scanners
          for s in mixers for d in dtypes for v1 in (False, True) if name != "cuda" or not v1),
    ]  # fmt: skip
    part, parts = bench.options.part
    jobs = jobs[part - 1 :: parts]
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
    names = sorted({name for name, _ in scanners + convolvers})
    what = f"{done} of {len(jobs)} groups of comparisons made ({', '.join(names)})"
    bench.add("check", f"{what}, {bench.judged} tensors, {len(bench.failures)} failures")


def run_once(device: str, size: str, dtype: torch.dtype) -> None:
    """Every CUDA kernel in both directions: scan (whole, cut in time, saving), convolution and mixer, and backward."""
    from mamba_ssm_vim.ops.mixer import cuda as cuda_mixer

    batch, seqlen, dim = {"small": (2, 37, 70), "Ti": (128, 197, 384)}[size]
    for reverse in (False, True):
        flags = {"delta_softplus": True, "reverse": reverse}
        scan = scan_backends.module("cuda")
        tensors = scan_inputs(device, batch, seqlen, dim, N, 1, dtype)
        out, last, saved = scan.forward(*tensors, **flags, save=True)
        scan.backward(out, last, *tensors, saved, **flags)
        scan.forward(*scan_inputs(device, 1, 530, 20, N, 1, dtype), **flags)
        x, weight, bias = tensors[0], torch.randn(dim, 4, device=device), torch.randn(dim, device=device)
        conv = conv_backends.module("cuda")
        conv.backward(conv.forward(x, weight, bias, None, silu=True, reverse=reverse), x, weight, bias, None,
                      silu=True, reverse=reverse)  # fmt: skip
    xz, ways = rounded(device, dtype, batch, seqlen, 2 * dim), directions(device, dim, 12)
    out, kept = cuda_mixer.forward(xz, ways, scale=0.5, save=True)
    cuda_mixer.backward(out, xz, ways, kept, scale=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="run every CUDA kernel once")
    parser.add_argument("--size", choices=("small", "Ti"), default="small")
    parser.add_argument("--dtype", choices=[short(d) for d in LIMITS], action="append")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for name in options.dtype or [short(d) for d in LIMITS]:
            run_once("cuda", options.size, getattr(torch, name))
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
