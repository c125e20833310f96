"""What the operators' translations to ONNX share: pieces of graphs for torch's TorchScript-based exporter."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_FLOAT = 1  # of onnx.TensorProto.DataType


class Graph:
    """Standard ONNX operators in the graph that `torch.onnx.export(dynamo=False)` builds, in float32.

    Args:
        context: what the exporter passes to a symbolic function, or to a loop's body.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.op = context.op

    def given(self, value: Any) -> bool:
        """Whether an optional argument is there."""
        return not value.node().mustBeNone()

    def sizes(self, value: Any) -> list[int | None]:
        """Sizes of a value, None for those that may change."""
        return value.type().varyingSizes()

    def float32(self, value: Any) -> Any:
        """The value in float32, in which the operators compute."""
        return self.op("Cast", value, to_i=_FLOAT)

    def like(self, value: Any, model: Any) -> Any:
        """The value in another one's type."""
        return self.op("CastLike", value, model)

    def ints(self, *numbers: int) -> Any:
        """A constant list of integers."""
        return self.op("Constant", value_t=torch.tensor(numbers, dtype=torch.int64))

    def number(self, number: float | int | bool) -> Any:
        """A constant."""
        dtype = torch.float32 if isinstance(number, float) else None
        return self.op("Constant", value_t=torch.tensor(number, dtype=dtype))

    def reshape(self, value: Any, *sizes: int) -> Any:
        """As `torch.reshape`; 0 keeps a size, and needs a -1 elsewhere."""
        return self.op("Reshape", value, self.ints(*sizes))

    def transpose(self, value: Any, *order: int) -> Any:
        """As `torch.permute`."""
        return self.op("Transpose", value, perm_i=list(order))

    def flip(self, value: Any, axis: int) -> Any:
        """As `torch.flip` over one axis."""
        ends = (self.ints(-1), self.ints(-(2**62)), self.ints(axis), self.ints(-1))
        return self.op("Slice", value, *ends)

    def silu(self, value: Any) -> Any:
        """x · sigmoid(x)."""
        return self.op("Mul", value, self.op("Sigmoid", value))

    def mean(self, value: Any, count: int) -> Any:
        """Mean over the last axis of size `count`, which stays with size 1."""
        total = self.op("ReduceSum", value, self.ints(-1), keepdims_i=1)
        return self.op("Mul", total, self.number(1.0 / count))

    def loop(self, xs: Sequence[Any], state: Any, step: Callable) -> tuple[Any, Any]:
        """Run `step(graph, state, *slices) → (state, y)` over the first axis of `xs`: the last state, and all y."""
        from torch.onnx._internal.torchscript_exporter import jit_utils, utils

        count = self.op("Gather", self.op("Shape", xs[0]), self.number(0), axis_i=0)
        run = self.number(True)
        inputs = (count, run, state)
        results, (body,), _ = jit_utils.add_op_with_blocks(self.context, "Loop", *inputs, outputs=2, n_blocks=1)
        index, _, before = (utils._add_input_to_block(body.block) for _ in range(3))
        graph = Graph(body)
        after, y = step(graph, before, *(graph.op("Gather", x, index, axis_i=0) for x in xs))
        for output in (graph.number(True), after, y):
            utils._add_output_to_block(body.block, output)
        return results
