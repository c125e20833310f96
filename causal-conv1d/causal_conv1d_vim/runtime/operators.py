"""Registration of an operator with torch, and the checks that every operator makes.

An operator is a kernel (a Python function with type hints that calls a backend), a function of its results' shapes, and
a derivative. Registered here it works in a compiled or exported graph, on the meta device and under `torch.func`. The
kernels get bare addresses, so whatever reaches one has been checked.
"""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch.onnx import register_custom_op_symbolic, symbolic_helper

from causal_conv1d_vim.runtime.autodiff import recording

FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
COMPLEX = frozenset((torch.complex64, torch.complex128))

_INTEGERS = frozenset((torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8))

_NAMESPACE = "vision_mamba"
# The first opset that has every operator of the symbolic functions; how these get arguments that are no tensors.
_ONNX_OPSET, _PARSED = 15, {"bool": "b", "float": "f", "int": "i"}
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")

Operand = tuple[str, torch.Tensor | None, tuple[int, ...] | None]


def check(
    operands: Iterable[Operand], *, activations: tuple[str, ...] = (), may_be_complex: tuple[str, ...] = ()
) -> None:
    """Raise unless tensors have the shapes expected, a type that the operators take and one device.

    Args:
        operands: (name, tensor or None, shape or None where it has been checked); the first decides the device.
        activations: names of those that are float64 if and only if the first one is.
        may_be_complex: names of those that need not be real.

    Raises:
        ValueError: one of them does not fit.
    """
    # Every look at a tensor costs a twentieth of a microsecond, which small calls notice.
    first = None
    for name, t, shape in operands:
        if t is None:
            continue
        dtype = t.dtype
        if first is None:
            first, its_name, its_dtype, on_cpu = t, name, dtype, t.is_cpu
        if shape is not None and t.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(t.shape)}")
        if t.is_cpu is not on_cpu or (not on_cpu and t.device != first.device):
            raise ValueError(
                f"all tensors must be on one device: {its_name} is on {first.device}, {name} on {t.device}"
            )
        if dtype not in FLOATING and not (dtype in COMPLEX and name in may_be_complex):
            check_dtype(name, dtype)
        if dtype is not its_dtype and name in activations and torch.float64 in (dtype, its_dtype):
            raise ValueError(f"{its_name} and {name} must both be float64 or neither, got {its_dtype} and {dtype}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise unless a type is one that the operators take.

    Raises:
        ValueError: it is not.
    """
    if dtype not in FLOATING:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype}: convert it")


def check_integers(name: str, t: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless a tensor of indices or counts, if there is one, has integers and the shape expected.

    Raises:
        ValueError: it does not.
    """
    if t is not None and (t.shape != shape or t.dtype not in _INTEGERS):
        raise ValueError(f"{name} must be {tuple(shape)} integers, got {tuple(t.shape)} of {t.dtype}")


def _with_dense_tensors(op: torch._ops.OpOverload, kernel: Callable) -> Callable:
    """`kernel`, called with dense tensors only: of others, addresses and strides mean something else."""
    places = [(a.name, str(a.type)) for a in op._schema.arguments]

    def dense(*args: Any) -> Any:
        for (name, kind), t in zip(places, args, strict=True):
            if isinstance(t, torch.Tensor):
                if t.layout is not torch.strided:
                    layout = str(t.layout).removeprefix("torch.")
                    raise ValueError(f"{name} must be a dense tensor, got the layout {layout}: convert it")
            elif t is None and kind == "Tensor":
                raise ValueError(f"{name} must be a tensor, got None, as an argument of {op}")
        return kernel(*args)

    return dense


def _function(name: str, op: Callable, setup_context: Callable | None, vjp: Callable | None) -> type:
    """The operator with its derivative as an autograd function, with the rules that `torch.func` asks for."""

    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def no_second_derivative(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{name.removesuffix('_backward')} has no second derivative: call backward without create_graph=True, "
            "or differentiate the reference function twice"
        )

    def no_forward_mode(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(
            f"{name} has no forward-mode derivative (jvp): use reverse mode, or differentiate the reference function"
        )

    def slice_by_slice(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        results = [
            function.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    members = {
        "forward": forward,
        "setup_context": setup_context or (lambda ctx, inputs, output: None),
        "backward": vjp or no_second_derivative,
        "jvp": no_forward_mode,
        "vmap": slice_by_slice,
    }
    members = {key: staticmethod(value) for key, value in members.items()}
    function = type(name, (torch.autograd.Function,), members)
    return function


def _define(name: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """The operator with its kernel and its shapes, without a derivative."""
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, _NAMESPACE), name).default
    _library.impl(name, _with_dense_tensors(op, kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _with_dense_tensors(op, fake), lib=_library)
    return op


def register_composed(
    name: str, kernel: Callable, fake: Callable, autograd: Callable | None = None, composition: Callable | None = None
) -> torch._ops.OpOverload:
    """Register `torch.ops.vision_mamba.<name>` for an operator that is composed of others and fuses them where it can.

    Args:
        name, kernel, fake: see `register`; arguments may be lists of tensors.
        autograd: what runs in place of the operator where it may be differentiated.
        composition: the same computed with other operators, which is what the transforms of `torch.func` see.

    Returns:
        The operator.
    """
    op = _define(name, kernel, fake)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")
    if composition is not None:
        _library.impl(name, composition, "FuncTorchDynamicLayerFrontMode")
    return op


def register(
    name: str,
    kernel: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    vjp: Callable | None = None,
    onnx: ModuleType | None = None,
) -> torch._ops.OpOverload:
    """Register `torch.ops.vision_mamba.<name>`.

    Args:
        name: of the operator.
        kernel: tensors in, new contiguous tensors out; its type hints become the schema.
        fake: from the same arguments makes results of the right shapes, without values; checks what the kernel checks.
        setup_context, vjp: as `torch.library.register_autograd` takes them; without them differentiating raises.
        onnx: has a `decomposition` and a `symbolic` function, for the two exporters of `torch.onnx`.

    Returns:
        The operator.
    """
    op = _define(name, kernel, fake)
    function = _function(name, op, setup_context, vjp)

    def autograd(*args: Any) -> Any:
        # torch's table of decompositions would serve the exporter too, but Inductor refuses operators that stand in it.
        if onnx is not None and type(args[0]) is not torch.Tensor and torch.onnx.is_in_onnx_export():
            return onnx.decomposition(*args)
        recorded = recording(*(t for t in args if isinstance(t, torch.Tensor)))
        return (function.apply if recorded else function.forward)(*args)

    _library.impl(name, autograd, "Autograd")
    # Transforms want to meet the autograd function before the dispatcher takes their layers apart.
    _library.impl(name, lambda *args: function.apply(*args), "FuncTorchDynamicLayerFrontMode")
    if onnx is not None:
        parse = symbolic_helper.parse_args(*(_PARSED.get(str(a.type), "v") for a in op._schema.arguments))
        register_custom_op_symbolic(f"{_NAMESPACE}::{name}", parse(onnx.symbolic), _ONNX_OPSET)
    return op
