"""Residual add with RMSNorm or LayerNorm in Triton; on CPU tensors under TRITON_INTERPRET=1 if forced."""

import math

import torch
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.tensors import cast_like
from causal_conv1d_vim.runtime.triton import guard

from mamba_ssm_vim.ops.norm.reference import NormGradients

MAX_DIM = 8192
TILE = 4096  # elements of a step: 32 per thread of 4 warps
PARTIAL_SUMS = 512  # programs of the backward pass at most: rows of the partial sums of dweight


def why_not(x: torch.Tensor) -> str | None:
    """None if these kernels can serve x (..., D), else the reason."""
    if x.shape[-1] > MAX_DIM:
        return f"rows of {x.shape[-1]} are wider than {MAX_DIM}"
    return triton_runtime.why_not(x)


def _tile(dim: int) -> dict[str, int]:
    block = max(16, 1 << (dim - 1).bit_length())
    return {"ROWS": max(1, TILE // block), "BLOCK_D": block, "num_warps": 4 if block <= 2048 else 8, "num_stages": 1}


def forward(x, residual, weight, bias, *, eps, rms, residual_dtype):
    """x, residual (..., D) → y (..., D) in x's dtype, x + residual in `residual_dtype`, mean or None, rstd (...,)."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    total = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = None if rms else torch.empty_like(rstd)
    if x.numel():
        from mamba_ssm_vim.ops.norm import triton_kernels as kernels

        dim, meta = x.shape[-1], _tile(x.shape[-1])
        count = x.numel() // dim
        with guard(x):
            kernels.norm_forward[(math.ceil(count / meta["ROWS"]),)](
                x, residual, weight, bias, y, total, mean, rstd, count, dim, float(eps),
                RMS=rms, **meta,
            )  # fmt: skip
    return y, total, mean, rstd


def backward(dy, dresidual_out, residual_out, weight, bias, mean, rstd, *, rms, x_dtype):
    """The gradients by name; when x is float32, those of x and of the residual are the same tensor."""
    dy = dy.contiguous()
    incoming = None if dresidual_out is None else dresidual_out.contiguous()
    weight = weight.contiguous()
    dim, meta = dy.shape[-1], _tile(dy.shape[-1])
    count = dy.numel() // dim if dim else 0
    dresidual = torch.empty(dy.shape, dtype=torch.float32, device=dy.device)
    dx = dresidual if x_dtype == torch.float32 else torch.empty(dy.shape, dtype=x_dtype, device=dy.device)
    if count == 0:
        return NormGradients(dx, dresidual, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias))
    from mamba_ssm_vim.ops.norm import triton_kernels as kernels

    steps = math.ceil(math.ceil(count / meta["ROWS"]) / PARTIAL_SUMS)
    programs = math.ceil(count / (steps * meta["ROWS"]))
    dweight = torch.empty(programs, dim, dtype=torch.float32, device=dy.device)
    dbias = None if bias is None else torch.empty_like(dweight)
    with guard(dy):
        kernels.norm_backward[(programs,)](
            dy, incoming, residual_out, weight, mean, rstd, dx, dresidual, dweight, dbias, count, dim, steps,
            RMS=rms, ROUNDED=x_dtype != torch.float32, **meta,
        )  # fmt: skip
    dbias = None if bias is None else dbias.sum(0)
    return NormGradients(dx, dresidual, cast_like(dweight.sum(0), weight), cast_like(dbias, bias))
