"""ONNX export: to standard operators, the scan to ONNX Scan, or the mixer to the native kernels in ONNX Runtime.

Needs the `export` extra (onnx, onnxscript). The translations to standard operators are registered with the operators.
"""

import contextlib
from pathlib import Path

import onnx
import torch
from mamba_ssm_vim.ops.mixer.op import kept_whole
from onnxscript import values

from vim.models.checks import ready_for_export
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


def _native_mixer(xz, tensors, reverses, scale):
    if len(reverses) > _DIRECTIONS:
        raise ValueError(f"the native mixer takes {_DIRECTIONS} directions, got {len(reverses)}")
    return _MIXER(xz, *tensors, reverse=sum(bool(r) << d for d, r in enumerate(reverses)), scale=scale)


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
    whole = kept_whole() if native else contextlib.nullcontext()
    translations = {torch.ops.vision_mamba.mixer.default: _native_mixer} if native else None
    with ready_for_export(model), whole:
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *model.input_shape),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            custom_translation_table=translations,
            dynamo=True,
            verbose=False,
        )
    program.save(str(file))
    return onnx.load(str(file))
