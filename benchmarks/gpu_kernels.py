"""Inputs for kernels on a GPU, which gpu.py measures and tests/gpu checks.

    python benchmarks/gpu_kernels.py [--size small|Ti] [--dtype bfloat16]

runs every CUDA kernel once and compares nothing: what compute-sanitizer (small) and ncu (Ti) want to look at.
"""

import argparse

import torch
from causal_conv1d_vim.conv import backends as conv_backends
from causal_conv1d_vim.runtime.backend import use_backend
from mamba_ssm_vim.ops.mixer import Direction, mixer
from mamba_ssm_vim.ops.selective_scan import backends as scan_backends

N = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def make_directions(device, dim: int, rank: int, v1: bool = False) -> list[Direction]:
    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, device=device)

    A = -torch.arange(1.0, N + 1, device=device).repeat(dim, 1)
    made = [
        Direction(
            normal(dim, 4), normal(dim), normal(rank + 2 * N, dim), normal(dim, rank), normal(dim) - 4, A.clone(),
            normal(dim), reverse=reverse, A_back=1.5 * A if v1 else None,
        )
        for reverse in ((False,) if v1 else (False, True))
    ]  # fmt: skip
    for direction in made:
        for tensor in vars(direction).values():
            if isinstance(tensor, torch.Tensor):
                tensor.requires_grad_()
    return made


def mixer_step(xz: torch.Tensor, directions: list[Direction], dout: torch.Tensor) -> list[torch.Tensor]:
    """Output of the mixer, then the gradients of xz and of every parameter."""
    leaves = [xz, *(t for direction in directions for t in vars(direction).values() if isinstance(t, torch.Tensor))]
    out = mixer(xz, directions, scale=0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


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
    xz, directions = rounded(device, dtype, batch, seqlen, 2 * dim), make_directions(device, dim, 12)
    out, kept = cuda_mixer.forward(xz, directions, scale=0.5, save=True)
    cuda_mixer.backward(out, xz, directions, kept, scale=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="run every CUDA kernel once")
    parser.add_argument("--size", choices=("small", "Ti"), default="small")
    parser.add_argument("--dtype", choices=[short(d) for d in DTYPES], action="append")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for name in options.dtype or [short(d) for d in DTYPES]:
            run_once("cuda", options.size, getattr(torch, name))
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
