"""CPU backend of the causal convolution: packs the arguments of causal-conv1d/csrc/cpu/conv.h.

x (B, L, E) may be a view of a channel-first (B, E, L): other kernels then go along its rows, and results are laid out
like it.
"""

import torch

import causal_conv1d_vim
from causal_conv1d_vim.conv.reference import ConvGradients
from causal_conv1d_vim.runtime import cpu_library
from causal_conv1d_vim.runtime.tensors import DTYPES, address, cast_like, plain, rows

ARGUMENTS = cpu_library.Arguments(
    "batch len dim width silu reverse threads accumulate_dx x:tokens out:tokens dx:tokens "
    "weight bias initial dinitial dweight dbias"
)
PROJECT_ARGUMENTS = cpu_library.Arguments("project_weight outputs projected", base=ARGUMENTS)

library = cpu_library.Library("vim_conv", causal_conv1d_vim.__path__)
_forward = library.function("vim_conv_forward", ARGUMENTS)
_backward = library.function("vim_conv_backward", ARGUMENTS)
_rows_forward = library.function("vim_conv_rows_forward", ARGUMENTS)
_rows_backward = library.function("vim_conv_rows_backward", ARGUMENTS)
_project = library.function("vim_conv_project", PROJECT_ARGUMENTS)
_pack = ARGUMENTS.pack

MAX_WIDTH = 16
_PARALLEL_FROM = 1 << 15  # elements; fewer are done before a second thread has woken up


def why_not(x: torch.Tensor, weight: torch.Tensor | None = None) -> str | None:
    """None if x (B, L, E) and weight (E, W) can be served here, else the reason."""
    if weight is not None and weight.shape[1] > MAX_WIDTH:
        return f"the width is {weight.shape[1]}, more than {MAX_WIDTH}"
    return cpu_library.why_not(library, x)


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1


def _along_tokens(x: torch.Tensor) -> bool:
    """Whether tokens, and not channels, are adjacent in x (B, L, E)."""
    return x.stride(1) == 1 and x.stride(2) != 1


def _new(x: torch.Tensor, along_tokens: bool) -> torch.Tensor:
    """A new tensor of x's shape (B, L, E) and dtype, in the layout asked for."""
    _, seqlen, dim = x.shape
    # Not a transposed view, which autograd would forbid to modify.
    return x.new_empty_strided(x.shape, (seqlen * dim, 1, seqlen) if along_tokens else (seqlen * dim, dim, 1))


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
    """out (B, L, E) in x's dtype; see `causal_conv1d_ref`.

    Args:
        out: where to write, of any supported dtype; allocated if None.

    Raises:
        ValueError: the kernel is wider than 16.
    """
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    if width > MAX_WIDTH:
        raise ValueError(
            f"the native convolution takes widths up to {MAX_WIDTH}, got {width}: use the reference backend"
        )
    along_tokens = out is None and _along_tokens(x)
    kernel, step = (_rows_forward, 2) if along_tokens else (_forward, 1)
    x = x if along_tokens else rows(x)
    weight, bias, initial_state = plain(weight), plain(bias), plain(initial_state)
    if out is None:
        out = _new(x, along_tokens)
    if out.numel():
        xs, os = x.stride(), out.stride()
        kernel(
            _pack(
                batch, seqlen, dim, width, silu, reverse, _threads(x), 0,
                x.data_ptr(), DTYPES[x.dtype], xs[0], xs[step], out.data_ptr(), DTYPES[out.dtype], os[0], os[step],
                0, 0, 0, 0, weight.data_ptr(), address(bias), address(initial_state), 0, 0, 0,
            )
        )  # fmt: skip
    return out


def forward_projected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    project_weight: torch.Tensor,
    *,
    silu: bool,
    reverse: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, L, E) of `forward`, in float32, and its projection out @ project_weight^T (B, L, O) in the same pass.

    Args:
        x: (B, L, E), any supported dtype.
        project_weight: (O, E); used in float32.
        out: contiguous float32 memory for the result; allocated if None.
    """
    batch, seqlen, dim = x.shape
    x, weight, bias, project_weight = rows(x), plain(weight), plain(bias), plain(project_weight)
    if out is None:
        out = x.new_empty((batch, seqlen, dim), dtype=torch.float32)
    projected = x.new_empty((batch, seqlen, project_weight.shape[0]), dtype=torch.float32)
    if out.numel():
        xs = x.stride()
        _project(
            _pack(
                batch, seqlen, dim, weight.shape[1], silu, reverse, _threads(x), 0,
                x.data_ptr(), DTYPES[x.dtype], xs[0], xs[1], out.data_ptr(), DTYPES[out.dtype], seqlen * dim, dim,
                0, 0, 0, 0, weight.data_ptr(), address(bias), 0, 0, 0, 0,
            )
            + PROJECT_ARGUMENTS.pack(project_weight.data_ptr(), project_weight.shape[0], projected.data_ptr())
        )  # fmt: skip
    return out, projected


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
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    dx = out.x
    along_tokens = dx is None and _along_tokens(x)
    if along_tokens:
        kernel, step = _rows_backward, 2
        dout = dout if _along_tokens(dout) else dout.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        kernel, step = _backward, 1
        x, dout = rows(x), rows(dout)
    weight32, bias32, initial32 = plain(weight), plain(bias), plain(initial_state)
    if dx is None:
        dx = _new(x, along_tokens)
    dweight = x.new_empty((dim, width), dtype=torch.float32)
    dbias = None if bias is None else x.new_empty(dim, dtype=torch.float32)
    dinitial = None
    if initial_state is not None:
        dinitial = x.new_empty((batch, width - 1, dim), dtype=torch.float32)
    xs, os, ds = x.stride(), dout.stride(), dx.stride()
    kernel(
        _pack(
            batch, seqlen, dim, width, silu, reverse, _threads(x), accumulate,
            x.data_ptr(), DTYPES[x.dtype], xs[0], xs[step], dout.data_ptr(), DTYPES[dout.dtype], os[0], os[step],
            dx.data_ptr(), DTYPES[dx.dtype], ds[0], ds[step], weight32.data_ptr(), address(bias32), address(initial32),
            address(dinitial), dweight.data_ptr(), address(dbias),
        )
    )  # fmt: skip
    return ConvGradients(dx, cast_like(dweight, weight), cast_like(dbias, bias), cast_like(dinitial, initial_state))
