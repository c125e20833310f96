"""ONNX export: to standard operators, the scan to ONNX Scan, or the mixer to the native kernels in ONNX Runtime.

Needs the `export` extra (onnx, onnxscript). Legend: B batch, L tokens, E inner width, N states, W convolution width.
"""

import contextlib
from pathlib import Path
from typing import Any

import onnx
import torch
from mamba_ssm_vim.ops.mixer.op import kept_whole
from onnxscript import FLOAT, graph, script, values
from onnxscript import opset18 as op

from vim.models.vision_mamba import VisionMamba

OPSET = 18
_LOCAL = values.Opset("vision_mamba", 1)
_PER_DIRECTION, _DIRECTIONS = 8, 2  # tensors of a direction of the mixer, and the most directions


def _mixer_operator() -> values.Op:
    """The operator of mamba-1p1p1/csrc/onnxruntime: xz, then the tensors of each direction, in float32."""
    kinds, types = onnx.defs.OpSchema.FormalParameterOption, onnx.defs.OpSchema.AttrType
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    weights = (f"weight_{i}" for i in range(_DIRECTIONS * _PER_DIRECTION))
    schema = onnx.defs.OpSchema(
        "Mixer", _LOCAL.domain, _LOCAL.version,
        inputs=[parameter("xz", "tensor(float)"),
                *(parameter(w, "tensor(float)", param_option=kinds.Optional) for w in weights)],
        outputs=[parameter("out", "tensor(float)")],
        attributes=[attribute("reverse", types.INT), attribute("scale", types.FLOAT)],
    )  # fmt: skip
    return values.Op(_LOCAL, "Mixer", schema)


_MIXER = _mixer_operator()


@script(_LOCAL, default_opset=op)
def _scan_forward(dt: FLOAT, dtu: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT) -> tuple[FLOAT, FLOAT]:
    # dt, dtu (L, B, 1, E), A (N, E), B (L, B, N, 1), C (L, B, 1, N) → y (L, B, 1, E) and the last state (B, N, E):
    # channels innermost, where ONNX Runtime's loops are two to four times as fast as with states innermost.
    start = op.Gather(dt, op.Constant(value_int=0), axis=0) * A * op.Constant(value_float=0.0)

    @graph()
    def step(state, dt_t, dtu_t, b_t, c_t):
        state_next = op.Exp(dt_t * A) * state + dtu_t * b_t
        y_t = op.MatMul(c_t, state_next)
        return state_next, y_t

    last, y = op.Scan(start, dt, dtu, B, C, body=step, num_scan_inputs=4)
    return y, last


@script(_LOCAL, default_opset=op)
def _scan_reverse(dt: FLOAT, dtu: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT) -> tuple[FLOAT, FLOAT]:
    start = op.Gather(dt, op.Constant(value_int=0), axis=0) * A * op.Constant(value_float=0.0)

    @graph()
    def step(state, dt_t, dtu_t, b_t, c_t):
        state_next = op.Exp(dt_t * A) * state + dtu_t * b_t
        y_t = op.MatMul(c_t, state_next)
        return state_next, y_t

    last, y = op.Scan(
        start, dt, dtu, B, C, body=step, num_scan_inputs=4,
        scan_input_directions=[1, 1, 1, 1], scan_output_directions=[1],
    )  # fmt: skip
    return y, last


def _selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    if initial_state is not None or len(B.shape) != 4 or B.shape[2] != 1 or len(C.shape) != 4 or C.shape[2] != 1:
        raise ValueError("the ONNX export of selective_scan takes B and C of one group and no initial state")
    dt = delta if delta_bias is None else op.Add(delta, delta_bias)
    if delta_softplus:
        dt = op.Softplus(dt)
    third = op.Constant(value_ints=[2])
    y, last = (_scan_reverse if reverse else _scan_forward)(
        op.Unsqueeze(op.Transpose(dt, perm=[1, 0, 2]), third),
        op.Unsqueeze(op.Transpose(op.Mul(dt, u), perm=[1, 0, 2]), third),
        op.Transpose(A, perm=[1, 0]),
        op.Transpose(B, perm=[1, 0, 3, 2]),
        op.Transpose(C, perm=[1, 0, 2, 3]),
    )
    out = op.Transpose(op.Squeeze(y, third), perm=[1, 0, 2])
    if D is not None:
        out = op.Add(out, op.Mul(u, D))
    if z is not None:
        out = op.Mul(out, op.Mul(z, op.Sigmoid(z)))
    return out, op.Transpose(last, perm=[0, 2, 1])


def _causal_conv1d(x, weight, bias, initial_state, silu, reverse):
    if initial_state is not None:
        raise ValueError("the ONNX export of causal_conv1d takes no initial state")
    dim, width = weight.shape
    if reverse:
        ends = {"starts": [-1], "ends": [-width - 1], "axes": [1], "steps": [-1]}
        weight = op.Slice(weight, *(op.Constant(value_ints=v) for v in ends.values()))
    weight = op.Unsqueeze(weight, op.Constant(value_ints=[1]))
    pads = [0, width - 1] if reverse else [width - 1, 0]
    x = op.Transpose(x, perm=[0, 2, 1])
    inputs = (x, weight) if bias is None else (x, weight, bias)
    out = op.Conv(*inputs, group=dim, kernel_shape=[width], pads=pads)
    if silu:
        out = op.Mul(out, op.Sigmoid(out))
    return op.Transpose(out, perm=[0, 2, 1])


def _add_norm(x, residual, weight, bias, eps, rms, residual_dtype):
    total = x if residual is None else op.Add(x, residual)
    last_axis = op.Constant(value_ints=[-1])
    mean = op.ReduceMean(total, last_axis, keepdims=1)
    centred = total if rms else op.Sub(total, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), last_axis, keepdims=1)
    deviation = op.Sqrt(op.Add(variance, op.Constant(value_float=eps)))
    y = op.Mul(op.Div(centred, deviation), weight)
    if bias is not None:
        y = op.Add(y, bias)
    return y, total, op.Squeeze(mean, last_axis), op.Reciprocal(op.Squeeze(deviation, last_axis))


def _native_mixer(xz, tensors, reverses, scale):
    if len(reverses) > _DIRECTIONS:
        raise ValueError(f"the native mixer takes {_DIRECTIONS} directions, got {len(reverses)}")
    return _MIXER(xz, *tensors, reverse=sum(bool(r) << d for d, r in enumerate(reverses)), scale=scale)


def translations(native: bool = False) -> dict[Any, Any]:
    """The table of operator translations for `torch.onnx.export(custom_translation_table=...)`.

    Args:
        native: a whole mixer to the operator of the domain `vision_mamba`.
    """
    ops = torch.ops.vision_mamba
    table = {
        ops.selective_scan.default: _selective_scan,
        ops.causal_conv1d.default: _causal_conv1d,
        ops.add_norm.default: _add_norm,
    }
    if native:
        table[ops.mixer.default] = _native_mixer
    return table


def export_onnx(model: VisionMamba, file: str | Path, *, native: bool = False) -> onnx.ModelProto:
    """Write a float32 model with input `images` (batch, C, H, W), `batch` free, and output `logits`.

    Args:
        model: exported in evaluation mode, for images of its own size (`set_input_size` sets another one first).
        file: where to write.
        native: mixers are operators of the domain `vision_mamba`, which ONNX Runtime runs on CPUs with the library
            `mamba_ssm_vim.onnxruntime.library_path()`, several times as fast. Mixers that pool have no such operator.

    Returns:
        The model as written, of standard ONNX operators only unless `native`.

    Raises:
        ValueError: the model is not float32 throughout.
    """
    kinds = {p.dtype for p in model.parameters()}
    if kinds != {torch.float32}:
        raise ValueError(
            f"the model holds {', '.join(sorted(map(str, kinds)))}: convert it with .float() for the export"
        )
    training = model.training
    model.eval()
    whole = kept_whole() if native else contextlib.nullcontext()
    try:
        with whole, torch.no_grad():
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *model.input_shape),),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                custom_translation_table=translations(native),
                dynamo=True,
                verbose=False,
            )
    finally:
        model.train(training)
    program.save(str(file))
    return onnx.load(str(file))
