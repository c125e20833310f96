"""ONNX export: standard operators only, the logits of PyTorch, any batch; and the script's refusals."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import vim

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
from vim.models.export import export_onnx  # noqa: E402  needs onnx and onnxscript

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_onnx.py"


def check(model: torch.nn.Module, file: Path) -> None:
    """One file, several batches; logits of order 1 within the 1e-4 that two float32 runtimes must keep."""
    exported = export_onnx(model, file)
    assert {node.domain for node in exported.graph.node} == {""}
    assert not exported.functions
    scans = [node for node in exported.graph.node if node.op_type == "Scan"]
    assert len(scans) == 2 * len(model.layers)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        x = torch.randn(batch, model.in_chans, *model.patch_embed.img_size, generator=generator)
        (logits,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=0, atol=1e-4)


def filled(model: torch.nn.Module, golden_weights) -> torch.nn.Module:
    """Weights of a trained model's scale: a fresh head would hide differences."""
    return golden_weights.fill(model, "onnx").eval()


@pytest.mark.slow
@pytest.mark.parametrize("img_size", [(224, 224), (224, 448)])
def test_tiny(img_size: tuple[int, int], golden_weights, tmp_path: Path) -> None:
    check(filled(timm.create_model("vim_tiny_patch16_224", img_size=img_size), golden_weights), tmp_path / "vim.onnx")


@pytest.mark.slow
def test_small_rectangle(golden_weights, tmp_path: Path) -> None:
    model = timm.create_model("vim_nano_patch4_32", depth=2, img_size=(16, 40), in_chans=1, num_classes=3)
    check(filled(model, golden_weights), tmp_path / "vim.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"bimamba_type": "v1", "rms_norm": False},
    {"if_cls_token": False, "if_rope": True, "if_rope_residual": True, "init_layer_scale": 0.1},
], ids=["v1-layernorm", "rope-layerscale"])  # fmt: skip
def test_ablations(options: dict, golden_weights, tmp_path: Path) -> None:
    model = timm.create_model("vim_nano_patch4_32", depth=2, img_size=16, **options)
    check(filled(model, golden_weights), tmp_path / "vim.onnx")


def test_half_precision_is_refused(tmp_path: Path) -> None:
    model = vim.VisionMamba(depth=1, embed_dim=16, img_size=32).bfloat16()
    with pytest.raises(ValueError, match=r"\.float\(\)"):
        export_onnx(model, tmp_path / "vim.onnx")


@pytest.fixture(scope="module")
def export_script():
    """`scripts/export_onnx.py` as a module."""
    spec = importlib.util.spec_from_file_location("export_onnx_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_script(tmp_path: Path) -> None:
    model = timm.create_model("vim_nano_patch4_32", num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "vim.pth")
    arguments = ["--checkpoint", tmp_path / "vim.pth", "--img-size", "16", "32", "--output", tmp_path / "vim.onnx"]
    command = [sys.executable, SCRIPT, "vim_nano_patch4_32", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of PyTorch" in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / "vim.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": torch.zeros(1, 3, 16, 32).numpy()})[0].shape == (1, 3)


@pytest.mark.parametrize(("arguments", "words"), [
    (["vim_huge"], "no model vim_huge"),
    (["vim_nano_patch4_32", "--img-size", "2"], "img_size"),
    (["vim_nano_patch4_32", "--img-size", "1", "2", "3"], "--img-size"),
    (["vim_nano_patch4_32", "--checkpoint", "/nowhere.pth"], "no checkpoint"),
    (["vim_nano_patch4_32", "--output", "/nowhere/vim.onnx"], "no folder"),
])  # fmt: skip
def test_script_refuses(arguments: list[str], words: str, export_script, capsys) -> None:
    assert export_script.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
