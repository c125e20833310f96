"""What the operators' autograd functions share."""

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def dispatched() -> bool:
    """Whether an operator must go through torch's dispatcher, because somebody other than eager autograd watches.

    That is a compiler, `torch.jit.trace`, or a dispatch mode (fake tensors, FLOP counter).
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()


def gradients(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """Vector-Jacobian product of a reference function, None for every input that is None.

    Args:
        function: differentiable function of `inputs`; gives a tensor or a tuple of tensors.
        inputs: its arguments, tensors or None.
        cotangents: one per output; None counts as zeros.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        present = [t for t in leaves if t is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], present, [c for _, c in pairs], allow_unused=True, materialize_grads=True
            )
        )
    return tuple(None if t is None else next(found) for t in leaves)


def recording(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want the gradient of a function of these tensors.

    Raises:
        RuntimeError: one of them carries a tangent of forward-mode differentiation, which would be lost.
    """
    if forward_ad._current_level >= 0:
        for t in tensors:
            if t is not None and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    "the operators have no forward-mode derivative (jvp): use reverse mode, "
                    "or differentiate the reference function"
                )
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def forbid_double_backward(op: str) -> None:
    """Raise if a backward pass is itself being recorded; call it in an autograd function's backward.

    Raises:
        RuntimeError: `create_graph=True` reached this operator.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no second derivative: call backward without create_graph=True, "
            "or differentiate the reference function twice"
        )
