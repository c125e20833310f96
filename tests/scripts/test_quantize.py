"""int8 projections: which tensors change and which do not, logits near those in float32, and the script's refusals."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vim.engine import run

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxruntime", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
from vim.models.export import export_onnx  # noqa: E402  needs onnx
from vim.models.quantize import quantize_onnx, session  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "scripts" / "quantize_onnx.py"
FLAGS = (
    "--model", "vim_nano_patch4_32", "--model-kwargs", "depth=1", "--input-size", "32", "--batch-size", "2",
    "--num_workers", "0", "--device", "cpu", "--epochs", "1", "--aa", "none", "--no-repeated-aug", "--no-model-ema",
)  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """`scripts/quantize_onnx.py` as a module."""
    spec = importlib.util.spec_from_file_location("quantize_onnx_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_projections_in_eight_bits(golden_weights, tmp_path):
    model = golden_weights.fill(timm.create_model("vim_nano_patch4_32", depth=2), "onnx").eval()
    images = torch.randn(16, *model.input_shape, generator=torch.Generator().manual_seed(0)).numpy()
    export_onnx(model, tmp_path / "exact.onnx", native=True)
    quantize_onnx(tmp_path / "exact.onnx", tmp_path / "int8.onnx", [images[:8], images[8:]])
    graph = onnx.load(tmp_path / "int8.onnx").graph
    integers = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(integers) == 2 * len(model.layers) + 1  # in_proj and out_proj of each block, and the head
    # Two products of 7 and 8 bits fit into 16, as processors without VNNI add them.
    assert max(np.abs(onnx.numpy_helper.to_array(t)).max() for t in integers) <= 64
    assert sum(node.op_type == "Mixer" for node in graph.node) == len(model.layers)
    (exact,) = session(tmp_path / "exact.onnx", 1).run(None, {"images": images})
    (rounded,) = session(tmp_path / "int8.onnx", 1).run(None, {"images": images})
    assert (exact != rounded).any()
    # A step of 1/255 of an activation's range of some eight deviations is an error of one per cent a product; five
    # products in a row, and the mixers amplify what comes in.
    assert np.linalg.norm(exact - rounded) < 0.1 * np.linalg.norm(exact)


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        quantize_onnx(tmp_path / "exact.onnx", tmp_path / "int8.onnx", [])


@pytest.mark.slow
def test_script(script, jpegs, tmp_path, capsys):
    run.run([*FLAGS, "--data-path", str(jpegs), "--output_dir", str(tmp_path)])
    capsys.readouterr()
    assert (
        script.main([str(tmp_path / "checkpoint.pth"), "--output", str(tmp_path / "int8.onnx"), "--images", "4"]) == 0
    )
    found = re.findall(r"^(float32|int8): top-1 [\d.]+ % of 3, .* ([\d.]+) MB$", capsys.readouterr().out, re.M)
    assert [name for name, _ in found] == ["float32", "int8"]
    assert float(found[1][1]) < float(found[0][1])


@pytest.mark.parametrize(("arguments", "words"), [
    (["/nowhere.pth"], "no checkpoint"), (["x.pth", "--images", "0"], "--images is 0"),
    (["x.pth", "--output", "/nowhere/x.onnx"], "no folder"),
])  # fmt: skip
def test_script_refuses(arguments, words, script, capsys):
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
