"""Agreement of the architectures built on Vim with their authors' code: outputs, gradient norms, names and shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mamba_ssm_vim import use_backend

from vim.models import from_published

GOLDEN = Path(__file__).parents[1] / "golden" / "zoo"
ZOO = {
    tag: entry for tag, entry in json.loads((GOLDEN / "zoo.json").read_text()).items() if entry["arch"] != "adventurer"
}
SMALL = [tag for tag, entry in ZOO.items() if entry["gradients"]]
PUBLISHED = [tag for tag, entry in ZOO.items() if not entry["gradients"] and "weights_from" not in entry]
TRANSFER = [tag for tag, entry in ZOO.items() if "weights_from" in entry]


def build(entry: dict) -> torch.nn.Module:
    return from_published(entry["arch"], entry["model"], **entry["args"]).eval()


def compare(tag: str, golden_weights, dtype: torch.dtype, atol: float, *, fill: bool = True, model=None) -> None:
    """Tolerances of golden/zoo/README.md; in float64 the rounding of the file's float32 values is what remains."""
    golden, entry = np.load(GOLDEN / f"{tag}.npz"), ZOO[tag]
    if model is None:
        model = build(entry)
    assert {f"{k}:({','.join(map(str, v.shape))}{',' * (v.dim() == 1)})" for k, v in model.state_dict().items()} == set(
        golden["keys"].tolist()
    )
    if fill:
        golden_weights.fill(model, tag)
    model.to(dtype)
    x = golden_weights.standard_normal(tuple(entry["input"]), tag + "/input").to(dtype)
    x.requires_grad_(entry["gradients"])
    with torch.set_grad_enabled(entry["gradients"]):
        y = model(x)
    np.testing.assert_allclose(y.detach().numpy(), golden["output"], rtol=0, atol=atol)
    if not entry["gradients"]:
        return
    (y * golden_weights.standard_normal(tuple(y.shape), tag + "/cotangent").to(dtype)).sum().backward()
    norms = {f"gradnorm/{k}": p.grad.double().norm().item() for k, p in model.named_parameters() if p.requires_grad}
    norms["grad/input_norm"] = x.grad.double().norm().item()
    expected = {k: float(golden[k]) for k in golden.files if k.startswith("grad")}
    assert norms.keys() == expected.keys()
    for name, value in expected.items():
        # Norms that vanish up to rounding (dead parameters) have no relative error to speak of.
        assert norms[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("tag", SMALL)
def test_small(tag: str, backend: str | None, golden_weights) -> None:
    with use_backend(backend):
        compare(tag, golden_weights, torch.float32, 2e-5)


@pytest.mark.parametrize("tag", SMALL)
def test_float64(tag: str, golden_weights) -> None:
    compare(tag, golden_weights, torch.float64, 1e-6)


@pytest.mark.parametrize("tag", PUBLISHED)
def test_published_sizes(tag: str, golden_weights) -> None:
    compare(tag, golden_weights, torch.float32, 2e-4)
