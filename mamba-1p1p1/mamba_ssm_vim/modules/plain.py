"""Whether a fast path may read a submodule's parameters in place of calling it."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mamba_ssm_vim.ops.norm import RMSNorm

_CLASSES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, RMSNorm)
# Tensors whose values or names a compiler keeps; other subclasses (quantised, distributed) compute in their own way.
_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a linear layer, convolution or norm does what its class says with its own weight, and no more.

    It does more if something is attached: a subclass (adapters, quantised layers, parametrisations), a forward of its
    own (offloading), hooks on it or on every module, a weight computed by a hook (pruning, weight norm), or a weight of
    a tensor subclass. Such a module must be called.
    """
    return (
        type(module) in _CLASSES
        and type(module.__dict__["_parameters"].get("weight")) in _TENSORS
        and is_unhooked(module)
    )


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    own = module.__dict__
    return (
        not (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        )
        # Counters of operations hook into every module to know where they are; what they count is the operators.
        and (not torch_module._has_any_global_hook() or is_in_torch_dispatch_mode())
    )
