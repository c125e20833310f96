"""Causal convolution on NVIDIA GPUs: the CUDA C++ kernels of csrc/cuda, called through ctypes."""

import ctypes

import torch

import causal_conv1d_vim
from causal_conv1d_vim.conv.reference import ConvGradients
from causal_conv1d_vim.runtime.cuda_library import CudaLibrary, int32, int64, pointer
from causal_conv1d_vim.runtime.tensors import DTYPES, address, cast_like, rows

library = CudaLibrary(
    causal_conv1d_vim.__path__,
    "libcausal_conv1d_cuda.so",
    launchers=["vim_conv_forward", "vim_conv_backward", "vim_conv_pair_forward", "vim_conv_pair_backward"],
    queries={name: [int64, int64, int64] for name in ("vim_conv_backward_workspace", "vim_conv_pair_workspace")},
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


class ConvPairArgs(ctypes.Structure):
    """`vim::ConvPairArgs` of csrc/cuda/conv_pair.cu, field by field."""

    _fields_ = (
        ("x", pointer),
        *((name, pointer * 2) for name in ("weight", "bias", "out", "dout")),
        ("dx", pointer),
        *((name, pointer * 2) for name in ("dweight", "dbias")),
        ("workspace", pointer),
        *((name, int64) for name in ("x_batch", "x_token", "dx_batch", "dx_token", "batch", "seqlen", "dim")),
        *((name, int32) for name in ("width", "type")),
    )


def why_not(x: torch.Tensor, weight: torch.Tensor | None = None) -> str | None:
    """None if these kernels can serve a call on `x` (B, L, E) and `weight` (E, W), else the reason."""
    if (reason := library.why_not(x)) is not None:
        return reason
    if weight is not None and not 2 <= weight.shape[1] <= 4:
        return f"the width is {weight.shape[1]}, not 2 to 4"
    return None


def _arguments(x, weight, bias, initial_state, silu, reverse, **tensors) -> tuple[ConvArgs, list]:
    """The argument block, and the tensors that must outlive the launch call."""
    if not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"the convolution's width is {weight.shape[1]}; the CUDA kernels take 2 to 4")
    x = rows(x)
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
    args.width, args.type, args.silu, args.reverse = weight.shape[1], DTYPES[x.dtype], silu, reverse
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
    out: ConvGradients = ConvGradients(),
    accumulate: bool = False,
) -> ConvGradients:
    """The gradients by name, each in its input's dtype.

    Args:
        out: only `x` may be given: (B, L, E), channel stride 1.
        accumulate: add to `out.x` instead of overwriting it.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out.x is None else out.x
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=x.device)
    dinitial = None if initial_state is None else torch.zeros(initial_state.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        floats = library.query("vim_conv_backward_workspace", *x.shape)
        args, _alive = _arguments(
            x, weight, bias, initial_state, silu, reverse,
            dout=rows(dout.to(x.dtype)), dx=dx, dinitial_state=dinitial, dweight=dweight, dbias=dbias,
            workspace=torch.empty(floats, dtype=torch.float32, device=x.device),
        )  # fmt: skip
        args.accumulate_dx = accumulate
        library.launch("vim_conv_backward", args, x)
    return ConvGradients(dx, cast_like(dweight, weight), cast_like(dbias, bias), cast_like(dinitial, initial_state))


def _pair_arguments(x, weights, biases) -> tuple[ConvPairArgs, list]:
    """The argument block of both directions, and the tensors that must outlive the launch call."""
    if weights[0].shape != weights[1].shape or not 2 <= weights[0].shape[1] <= 4:
        shapes = " and ".join(str(tuple(w.shape)) for w in weights)
        raise ValueError(f"the weights are {shapes}; the CUDA kernels take two alike, 2 to 4 taps wide")
    args = ConvPairArgs()
    weights = [w.float().contiguous() for w in weights]
    biases = [None if b is None else b.float().contiguous() for b in biases]
    args.x, args.x_batch, args.x_token = x.data_ptr(), *x.stride()[:2]
    for i in range(2):
        args.weight[i], args.bias[i] = address(weights[i]), address(biases[i])
    args.batch, args.seqlen, args.dim = x.shape
    args.width, args.type = weights[0].shape[1], DTYPES[x.dtype]
    return args, [weights, biases]


def forward_pair(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> torch.Tensor:
    """Both convolutions of a bidirectional mixer with SiLU, in one launch.

    Args:
        x: (B, L, E), channels contiguous.
        weights, biases: (E, W), and (E,) or None, of the convolution along the tokens and of the one against them.

    Returns:
        (2, B, L, E) in x's dtype.
    """
    out = torch.empty(2, *x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        args, _alive = _pair_arguments(x, weights, biases)
        args.out[0], args.out[1] = out[0].data_ptr(), out[1].data_ptr()
        library.launch("vim_conv_pair_forward", args, x)
    return out


def backward_pair(
    douts: list[torch.Tensor],
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    dx: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Gradients of the weights and biases; that of x (B, L, E), the sum of both directions, is written to `dx`."""
    dweights = [torch.empty(w.shape, dtype=torch.float32, device=x.device) for w in weights]
    dbiases = [None if b is None else torch.empty(b.shape, dtype=torch.float32, device=x.device) for b in biases]
    args, _alive = _pair_arguments(x, weights, biases)
    douts = [d.contiguous() for d in douts]
    floats = library.query("vim_conv_pair_workspace", *x.shape)
    workspace = torch.empty(floats, dtype=torch.float32, device=x.device)
    args.workspace, args.dx, args.dx_batch, args.dx_token = address(workspace), dx.data_ptr(), *dx.stride()[:2]
    for i in range(2):
        args.dout[i], args.dweight[i], args.dbias[i] = map(address, (douts[i], dweights[i], dbiases[i]))
    library.launch("vim_conv_pair_backward", args, x)
    return (
        [g.to(w.dtype) for g, w in zip(dweights, weights, strict=True)],
        [None if g is None else g.to(b.dtype) for g, b in zip(dbiases, biases, strict=True)],
    )
