"""ONNX export: standard operators or the native mixer, the logits of PyTorch, any batch; and the script's refusals."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from mamba_ssm_vim.onnxruntime import library_path
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import vim

onnx = pytest.importorskip("onnx", reason="needs the export extra")
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


@pytest.mark.parametrize("options", [
    {}, {"img_size": (16, 24)}, {"bimamba_type": "v1", "rms_norm": False},
    {"bimamba_type": "none", "if_cls_token": False, "if_rope": True},
], ids=["v2", "rectangle", "v1-layernorm", "forward-only"])  # fmt: skip
def test_native_mixer(options: dict, golden_weights, tmp_path: Path) -> None:
    """The kernels of eager PyTorch on the session's threads; matrix products and norms are those of ONNX Runtime."""
    model = filled(timm.create_model("vim_nano_patch4_32", depth=2, **options), golden_weights)
    exported = export_onnx(model, tmp_path / "vim.onnx", native=True)
    kinds = [node.op_type for node in exported.graph.node if node.domain == "vision_mamba"]
    assert kinds == ["Mixer"] * len(model.layers)
    generator = torch.Generator().manual_seed(0)
    for threads in (1, 2):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.register_custom_ops_library(str(library_path()))
        session = onnxruntime.InferenceSession(tmp_path / "vim.onnx", settings, providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            x = torch.randn(batch, *model.input_shape, generator=generator)
            (logits,) = session.run(None, {"images": x.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=0, atol=1e-5)


def test_native_mixer_refuses_weights_that_do_not_fit(tmp_path: Path) -> None:
    """Kernels get bare addresses, so the operator checks every shape itself."""
    node = onnx.helper.make_node("Mixer", ["xz", *"wbpdtAD"], ["out"], domain="vision_mamba", reverse=0, scale=1.0)
    shapes = {"xz": (1, 3, 8), "w": (4, 2), "b": (4,), "p": (5, 4), "d": (4, 1), "t": (4,), "A": (4, 2), "D": (4,)}
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (*shapes, "out")]
    graph = onnx.helper.make_graph([node], "mixer", infos[:-1], infos[-1:])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("vision_mamba", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "mixer.onnx")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(tmp_path / "mixer.onnx", options, providers=["CPUExecutionProvider"])
    tensors = {name: torch.ones(shape).numpy() for name, shape in shapes.items()}
    assert session.run(None, tensors)[0].shape == (1, 3, 4)
    for name, shape in shapes.items():
        larger = (*shape[:-1], shape[-1] + 1) if name == "xz" else (shape[0] + 1, *shape[1:])
        wrong = tensors | {name: torch.ones(larger).numpy()}
        with pytest.raises(Exception, match="Mixer: "):
            session.run(None, wrong)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="compiles with g++ on Linux")
def test_classify_without_python(golden_weights, tmp_path: Path) -> None:
    source, headers = SCRIPT.with_name("classify.cpp"), SCRIPT.parents[1] / "mamba-1p1p1" / "csrc" / "onnxruntime"
    program = tmp_path / "classify"
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-Wall", "-Werror", "-I", headers, source, "-o", program, "-ldl"], check=True
    )
    (runtime,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    model = filled(timm.create_model("vim_nano_patch4_32", depth=2), golden_weights)
    export_onnx(model, tmp_path / "vim.onnx", native=True)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "picture.ppm").write_bytes(b"P6 32 32 255\n" + pixels.numpy().tobytes())
    command = [program, runtime, tmp_path / "vim.onnx", tmp_path / "picture.ppm", library_path()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image = (pixels.permute(2, 0, 1) / 255 - torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]) / torch.tensor(
        IMAGENET_DEFAULT_STD
    )[:, None, None]
    with torch.no_grad():
        likeliest = model(image[None]).softmax(-1)[0].topk(5)
    found = [line.split() for line in done.stdout.splitlines()]
    assert [int(index) for index, _ in found] == likeliest.indices.tolist()
    assert [float(p) for _, p in found] == pytest.approx(likeliest.values.tolist(), abs=2e-6)  # six digits are printed
    (tmp_path / "picture.ppm").write_bytes(b"P6 32 32 255\n" + pixels.numpy().tobytes()[:-1])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is cut off" in done.stderr


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
