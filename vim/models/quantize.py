"""ONNX models with the projections in int8: weights per output channel, activations in the range of calibration images.

Needs the `export` extra. The mixer between in_proj and out_proj, the residual stream and the norms stay float32.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from mamba_ssm_vim.onnxruntime import library_path
from onnxruntime.quantization import CalibrationDataReader, QuantType
from onnxruntime.quantization.calibrate import MinMaxCalibrater
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

# The matrix products with constant weights: in_proj, out_proj and the head.
_PRODUCTS = ["MatMul", "Gemm"]


def session(model: str | Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session on the CPU that knows the native mixer.

    Args:
        model: an ONNX file, with or without operators of this project.
        threads: of the session; 0 leaves the number to ONNX Runtime.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class _Images(CalibrationDataReader):
    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        return None if images is None else {"images": images}


class _Calibrator(MinMaxCalibrater):
    def create_inference_session(self) -> None:
        self.infer_session = session(self.augmented_model_path)


def quantize_onnx(model: str | Path, output: str | Path, batches: Iterable[np.ndarray]) -> None:
    """Write a model that `vim.models.export.export_onnx` has made with its projections in int8.

    Args:
        model: the file to read.
        output: the file to write.
        batches: normalised images (batch, C, H, W) in float32, a hundred or more in total; the range of every
            activation is the smallest that holds all values met.

    Raises:
        ValueError: there are no images.
    """
    first = next(iterator := iter(batches), None)
    if first is None:
        raise ValueError("there are no images to calibrate with")

    def all_batches() -> Iterator[np.ndarray]:
        yield first
        yield from iterator

    with tempfile.TemporaryDirectory() as folder:
        calibrator = _Calibrator(str(model), _PRODUCTS, augmented_model_path=str(Path(folder) / "augmented.onnx"))
        calibrator.augment_graph()
        calibrator.create_inference_session()
        calibrator.collect_data(_Images(all_batches()))
        ranges = calibrator.compute_data()
    # Outputs stay float32: the mixer reads them, and the residual stream adds them up.
    options = {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": _PRODUCTS}
    quantizer = QDQQuantizer(
        onnx.load(str(model)), per_channel=True,
        # Weights in 7 bits: without VNNI a processor adds pairs of products in 16 bits, where those of 8 bits saturate.
        reduce_range=True,
        weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8, tensors_range=ranges, nodes_to_quantize=[],
        nodes_to_exclude=[], op_types_to_quantize=_PRODUCTS, extra_options=options,
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(output), False)
