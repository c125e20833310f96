"""Agreement with the published model code: outputs, gradient norms, parameter names and shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mamba_ssm_vim import use_backend

import vim

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
VARIANTS = json.loads((GOLDEN / "variants.json").read_text())


def check(model: torch.nn.Module, file: str, tag: str, shape: tuple[int, ...], golden_weights) -> None:
    """Tolerances of golden/README.md: values of order 1 to 2e-4, gradient norms to 1e-3 relative."""
    golden = np.load(GOLDEN / f"{file}.npz")
    shapes = {f"{k}:{'x'.join(map(str, v.shape))}" for k, v in model.state_dict().items()}
    assert shapes == set(golden["keys"].tolist())
    golden_weights.fill(model, tag)
    x = golden_weights.standard_normal(shape, tag + "/input").requires_grad_()
    y = model(x)
    np.testing.assert_allclose(y.detach().numpy(), golden["output"], rtol=0, atol=2e-4)
    (y * golden_weights.standard_normal(tuple(y.shape), tag + "/cotangent")).sum().backward()
    norms = {f"gradnorm/{k}": p.grad.double().norm().item() for k, p in model.named_parameters()}
    norms["grad/input_norm"] = x.grad.double().norm().item()
    expected = {k: float(golden[k]) for k in golden.files if k.startswith("grad")}
    assert norms.keys() == expected.keys()
    for name, value in expected.items():
        # Norms that vanish up to rounding (dead parameters) have no relative error to speak of.
        assert norms[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("tag", VARIANTS)
def test_variant(tag: str, backend: str | None, golden_weights) -> None:
    arguments = VARIANTS[tag]
    model = vim.VisionMamba(**arguments).eval()
    size = arguments["img_size"]
    with use_backend(backend):
        check(model, tag, tag, (2, arguments.get("channels", 3), size, size), golden_weights)


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), None])
def test_tiny(backend: str | None, golden_weights) -> None:
    model = timm.create_model(TINY).eval()
    with use_backend(backend):
        check(model, "vim_tiny_patch16_224", TINY, (2, 3, 224, 224), golden_weights)
