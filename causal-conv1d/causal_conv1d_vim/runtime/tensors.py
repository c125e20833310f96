"""What compiled kernels need of a tensor: the code of its dtype, its address, and a layout that they can read."""

import torch

# DataType of csrc/common/dtype.h; the dtypes that the kernels take.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported_dtype(t: torch.Tensor) -> str | None:
    """None if the kernels take t's dtype, else the reason why not."""
    return None if t.dtype in DTYPES else f"{t.dtype} is none of float32, bfloat16, float16"


def rows(t: torch.Tensor | None) -> torch.Tensor | None:
    """`t` with adjacent elements along its last dimension, copied only if they are not."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def plain(t: torch.Tensor | None) -> torch.Tensor | None:
    """`t` as a contiguous float32 tensor, copied only if it is not one."""
    if t is None or (t.dtype is torch.float32 and t.is_contiguous()):
        return t
    return t.to(torch.float32).contiguous()


def cast_like(t: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the dtype of its input `like`; None if there is no such input."""
    if like is None:
        return None
    return t if t.dtype is like.dtype else t.to(like.dtype)


def address(t: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if t is None else t.data_ptr()
