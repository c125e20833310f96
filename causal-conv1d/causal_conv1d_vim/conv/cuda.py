"""Causal convolution on NVIDIA GPUs: the CUDA C++ kernels of csrc/cuda, called through ctypes."""

import ctypes

import torch

import causal_conv1d_vim
from causal_conv1d_vim.cuda_library import DATA_TYPES, CudaLibrary, address, int32, int64, pointer

library = CudaLibrary(
    causal_conv1d_vim.__path__,
    "libcausal_conv1d_cuda.so",
    launchers=["vim_conv_forward", "vim_conv_backward"],
    queries={"vim_conv_backward_workspace": [int64, int64, int64]},
)

_POINTERS = (
    "x", "weight", "bias", "initial_state", "out", "dout", "dx", "dinitial_state", "dweight", "dbias", "workspace",
)  # fmt: skip
_STRIDED = ("x", "out", "dout", "dx")


class ConvArgs(ctypes.Structure):
    """`vim::ConvArgs` of csrc/cuda/causal_conv1d.cu, field by field."""

    _fields_ = (
        *((name, pointer) for name in _POINTERS),
        *((f"{name}_{axis}", int64) for name in _STRIDED for axis in ("batch", "token")),
        *((name, int64) for name in ("batch", "seqlen", "dim")),
        *((name, int32) for name in ("width", "type", "silu", "reverse", "accumulate_dx", "reserved")),
    )


def why_not(x: torch.Tensor, weight: torch.Tensor | None = None) -> str | None:
    """None if these kernels can serve a call on `x` (B, L, E) and `weight` (E, W), else the reason."""
    if (reason := library.why_not(x)) is not None:
        return reason
    if x.dtype not in DATA_TYPES:
        return f"{x.dtype} is not among float32, bfloat16 and float16"
    if weight is not None and not 2 <= weight.shape[1] <= 4:
        return f"the width is {weight.shape[1]}, not 2 to 4"
    return None


def _rows(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its channels are neighbours in memory, else a contiguous copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _arguments(x, weight, bias, initial_state, silu, reverse, **tensors) -> tuple[ConvArgs, list]:
    """The argument block, and the tensors that must outlive the launch call."""
    if not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"the convolution's width is {weight.shape[1]}; the CUDA kernels take 2 to 4")
    x = _rows(x)
    weight = weight.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype).contiguous()
    args = ConvArgs()
    named = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state, **tensors}
    for name, t in named.items():
        setattr(args, name, address(t))
        if name in _STRIDED and t is not None:
            setattr(args, f"{name}_batch", t.stride(0))
            setattr(args, f"{name}_token", t.stride(1))
    args.batch, args.seqlen, args.dim = x.shape
    args.width, args.type, args.silu, args.reverse = weight.shape[1], DATA_TYPES[x.dtype], silu, reverse
    return args, list(named.values())


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    silu: bool,
    reverse: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, L, E) → (B, L, E), into `out` if given; weight (E, W), bias (E,), initial_state (B, W-1, E)."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        args, _alive = _arguments(x, weight, bias, initial_state, silu, reverse, out=out)
        library.launch("vim_conv_forward", args, x)
    return out


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    silu: bool,
    reverse: bool,
    dx_into: torch.Tensor | None = None,
    accumulate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of (x, weight, bias, initial_state); that of x goes to `dx_into`, added if `accumulate`."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx_into is None else dx_into
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=x.device)
    dinitial = None if initial_state is None else torch.zeros(initial_state.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        floats = library.query("vim_conv_backward_workspace", *x.shape)
        args, _alive = _arguments(
            x, weight, bias, initial_state, silu, reverse,
            dout=_rows(dout.to(x.dtype)), dx=dx, dinitial_state=dinitial, dweight=dweight, dbias=dbias,
            workspace=torch.empty(floats, dtype=torch.float32, device=x.device),
        )  # fmt: skip
        args.accumulate_dx = accumulate
        library.launch("vim_conv_backward", args, x)
    return (
        dx,
        dweight.to(weight.dtype),
        None if dbias is None else dbias.to(bias.dtype),
        None if dinitial is None else dinitial.to(initial_state.dtype),
    )
