"""TorchScript, torch.fx, torch.compile, torch.export and the meta device: each sees the model that eager runs."""

import io
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._features import FeatureGetterNet
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import vim

VARIANTS = json.loads((Path(__file__).parents[1] / "golden" / "variants.json").read_text())
NAMES = timm.list_models("vim_*", exclude_filters="*layernorm*")  # which test_zoo.py takes
# Operators one by one where eager fuses them: the same sums in another order, on values of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def script(model: torch.nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces TorchScript's end on every call
        return torch.jit.script(model)


def small(name: str, **kwargs) -> torch.nn.Module:
    """Two blocks of a registered model on a small image."""
    return timm.create_model(name, depth=2, img_size=32 if "nano" in name else 64, num_classes=5, **kwargs).eval()


def images(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    shape = (batch, model.in_chans, *model.patch_embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchscript_of_every_variant(variant: str) -> None:
    torch.manual_seed(0)
    model = vim.VisionMamba(**VARIANTS[variant]).eval()
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(script(model)(x), model(x), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_torchscript_of_every_model(name: str) -> None:
    torch.manual_seed(0)
    model = small(name)
    x = images(model)
    file = io.BytesIO()
    torch.jit.save(script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)
    with pytest.raises(torch.jit.Error, match="set_input_size"):
        loaded(images(model)[..., :-4])


def test_torchscript_trains() -> None:
    torch.manual_seed(0)
    model = small("vim_nano_patch4_32").train()
    x = images(model)
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    script(model)(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_torchscript_trace() -> None:
    torch.manual_seed(0)
    model = small("vim_nano_patch4_32")
    x = images(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's end, and Python values in the checks of the image size
        traced = torch.jit.trace(model, x, check_trace=False)
    other = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(traced(other), model(other), **CLOSE)


def test_torchscript_of_feature_maps() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", dynamic_img_size=True).eval()
    getter = FeatureGetterNet(model, out_indices=(0, 2)).eval()
    x = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        torch.testing.assert_close(script(getter)(x), getter(x), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_fx_of_every_model(name: str) -> None:
    torch.manual_seed(0)
    model = small(name)
    x = images(model)
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=tracer
    ).eval()
    assert torch.equal(next(iter(traced(x).values())), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fx_of_every_variant(variant: str) -> None:
    model = vim.VisionMamba(**VARIANTS[variant]).eval()
    x = images(model)
    tracer = torch.fx.Tracer(autowrap_functions=tuple(get_notrace_functions()))
    leaves = tuple(get_notrace_modules())
    is_leaf = tracer.is_leaf_module
    tracer.is_leaf_module = lambda module, name: isinstance(module, leaves) or is_leaf(module, name)
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_the_meta_device(name: str) -> None:
    """`device` and `dtype` are timm's factory arguments; a model on "meta" gives shapes without computing."""
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16).eval()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    x = images(model).to("meta", torch.bfloat16)
    logits = model(x)
    assert logits.shape == (2, model.num_classes)
    assert logits.dtype == torch.bfloat16
    assert model.forward_features(x).shape == (2, model.pos_embed.shape[1], model.num_features)


@pytest.mark.slow
def test_compile_and_export() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32").eval()
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # The fused mixer is in the graph: the same kernels in the same order.
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    five = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(exported.module()(five), model(five), **CLOSE)
