"""What the operators' autograd functions share."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def dispatched(required: Sequence[torch.Tensor] = (), optional: Sequence[torch.Tensor | None] = ()) -> bool:
    """Whether an operator must go through torch's dispatcher, because something besides eager autograd observes it.

    That is a compiler, `torch.jit.trace`, a dispatch mode (fake tensors, FLOP counter) or a transform of `torch.func`;
    or an argument is no tensor, or one that is not simply its memory: the dispatcher resolves negative views and zero
    tensors, knows the rules of subclasses and of the meta device, and has a sentence for everything else.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    try:
        for t in required:
            if t.is_neg() or (not t.data_ptr() and t.numel()):
                return True
        for t in optional:
            if t is not None and (t.is_neg() or (not t.data_ptr() and t.numel())):
                return True
    except (AttributeError, RuntimeError):  # not a tensor; a tensor without storage
        return True
    return False


def _autograd_keys() -> contextlib.AbstractContextManager:
    """Context in which operations are recorded even inside a registered operator, whose kernel runs below autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


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
    with torch.enable_grad(), _autograd_keys():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        pairs = [
            (o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad
        ]
        present = [t for t in leaves if t is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], present, [c for _, c in pairs], allow_unused=True, materialize_grads=True
            )
        )
    return tuple(None if t is None else next(found) for t in leaves)


def recording(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will need the gradient of a function of these tensors.

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
