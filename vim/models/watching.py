"""When registered operators must run in place of the faster eager calls."""

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


@torch.jit.unused
def operators_are_watched(x: torch.Tensor) -> bool:
    """Whether somebody needs to see registered operators, which eager calls bypass for speed.

    The meta device computes shapes with them, `torch.jit.trace` records them, and a dispatch mode (FLOP counter, fake
    tensors) counts or replaces them.
    """
    return x.is_meta or torch.jit.is_tracing() or (not torch.compiler.is_compiling() and is_in_torch_dispatch_mode())
