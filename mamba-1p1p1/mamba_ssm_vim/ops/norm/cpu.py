"""CPU backend of add + norm: packs the arguments of mamba-1p1p1/csrc/cpu/norm.h."""

import torch
from causal_conv1d_vim.runtime import cpu_library
from causal_conv1d_vim.runtime.tensors import DTYPES, address, cast_like, plain

from mamba_ssm_vim.cpu_library import library
from mamba_ssm_vim.ops.norm.reference import NormGradients

ARGUMENTS = cpu_library.Arguments(
    "rows dim rms threads eps:double x x_dtype residual residual_dtype y y_dtype residual_out residual_out_dtype "
    "weight bias mean rstd dresidual dweight dbias"
)

_forward = library.function("vim_norm_forward", ARGUMENTS)
_backward = library.function("vim_norm_backward", ARGUMENTS)
_pack = ARGUMENTS.pack

_PARALLEL_FROM = 1 << 15  # elements


def why_not(x: torch.Tensor) -> str | None:
    """None if x can be served here, else the reason."""
    return cpu_library.why_not(library, x)


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    rms: bool,
    residual_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(y, residual', mean or None, rstd); see `add_norm_ref`."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    dim = x.shape[-1]
    y, residual_out = x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = None if rms else torch.empty_like(rstd)
    weight, bias = plain(weight), plain(bias)
    if x.numel():
        _forward(
            _pack(
                x.numel() // dim, dim, rms, _threads(x), eps, x.data_ptr(), DTYPES[x.dtype],
                address(residual), 0 if residual is None else DTYPES[residual.dtype], y.data_ptr(), DTYPES[y.dtype],
                residual_out.data_ptr(), DTYPES[residual_dtype], weight.data_ptr(), address(bias), address(mean),
                rstd.data_ptr(), 0, 0, 0,
            )
        )  # fmt: skip
    return y, residual_out, mean, rstd


def backward(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    *,
    rms: bool,
    x_dtype: torch.dtype,
) -> NormGradients:
    """The gradients by name; when x is float32, those of x and of the residual are the same tensor."""
    dy = dy.contiguous()
    dresidual_out = None if dresidual_out is None else dresidual_out.contiguous()
    residual_out = residual_out.contiguous()
    dim = dy.shape[-1]
    dx = dy.new_empty(dy.shape, dtype=x_dtype)
    dresidual = dx if x_dtype is torch.float32 else dy.new_empty(dy.shape, dtype=torch.float32)
    weight32 = plain(weight)
    dweight = dy.new_zeros(dim, dtype=torch.float32)
    dbias = None if bias is None else torch.zeros_like(dweight)
    if dy.numel():
        _backward(
            _pack(
                dy.numel() // dim, dim, rms, _threads(dy), 0.0, dy.data_ptr(), DTYPES[dy.dtype],
                address(dresidual_out), 0 if dresidual_out is None else DTYPES[dresidual_out.dtype],
                dx.data_ptr(), DTYPES[x_dtype], residual_out.data_ptr(), DTYPES[residual_out.dtype],
                weight32.data_ptr(), 0, address(mean), rstd.data_ptr(), 0 if dresidual is dx else dresidual.data_ptr(),
                dweight.data_ptr(), address(dbias),
            )
        )  # fmt: skip
    return NormGradients(dx, dresidual, cast_like(dweight, weight), cast_like(dbias, bias))
