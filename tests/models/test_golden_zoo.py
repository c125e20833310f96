"""Agreement of the architectures built on Vim with their authors' code: outputs, gradient norms, names and shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mamba_ssm_vim import use_backend

from vim.models import from_published, load_into

GOLDEN = Path(__file__).parents[1] / "golden" / "zoo"
ZOO = {
    tag: entry for tag, entry in json.loads((GOLDEN / "zoo.json").read_text()).items() if entry["arch"] != "adventurer"
}
SMALL = [tag for tag, entry in ZOO.items() if entry["gradients"]]
PUBLISHED = [tag for tag, entry in ZOO.items() if not entry["gradients"] and "weights_from" not in entry]
TRANSFER = [tag for tag, entry in ZOO.items() if "weights_from" in entry]


def build(entry: dict) -> torch.nn.Module:
    return from_published(entry["arch"], entry["model"], **entry["args"]).eval()


def compare(
    tag: str, golden_weights, dtype: torch.dtype, atol: float, *, fill: bool = True, model=None, device: str = "cpu"
) -> None:
    """Tolerances of golden/zoo/README.md; in float64 the rounding of the file's float32 values is what remains."""
    golden, entry = np.load(GOLDEN / f"{tag}.npz"), ZOO[tag]
    if model is None:
        model = build(entry)
    assert {f"{k}:({','.join(map(str, v.shape))}{',' * (v.dim() == 1)})" for k, v in model.state_dict().items()} == set(
        golden["keys"].tolist()
    )
    if fill:
        golden_weights.fill(model, tag)
    model.to(device, dtype)
    x = golden_weights.standard_normal(tuple(entry["input"]), tag + "/input").to(device, dtype)
    x.requires_grad_(entry["gradients"])
    with torch.set_grad_enabled(entry["gradients"]):
        y = model(x)
    np.testing.assert_allclose(y.detach().cpu().numpy(), golden["output"], rtol=0, atol=atol)
    if not entry["gradients"]:
        return
    (y * golden_weights.standard_normal(tuple(y.shape), tag + "/cotangent").to(y)).sum().backward()
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


@pytest.mark.parametrize("tag", TRANSFER)
def test_transfer(tag: str, golden_weights) -> None:
    """Weights of a related model, fitted as the authors do."""
    origin = ZOO[tag]["weights_from"]
    source = from_published(ZOO.get(origin["tag"], ZOO[tag])["arch"], origin["model"], **origin["args"])
    golden_weights.fill(source, origin["tag"])
    model = golden_weights.fill(build(ZOO[tag]), tag)
    load_into(model, source.state_dict())
    golden = np.load(GOLDEN / f"{tag}.npz")
    if "pos_embed" in golden:
        np.testing.assert_allclose(model.pos_embed.detach().numpy(), golden["pos_embed"], rtol=0, atol=2e-6)
    compare(tag, golden_weights, torch.float32, 2e-5, fill=False, model=model)


def test_arm_sincos() -> None:
    golden = np.load(GOLDEN / "arm_sincos.npz")
    model = build(ZOO["arm_pretrain_d12"])
    np.testing.assert_allclose(model.pos_embed.numpy()[0], golden["grid12_dim32"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        model.pos_embed.numpy(), golden["model_pos_embed"].reshape(1, 144, 32), rtol=0, atol=1e-6
    )
    assert model.dec_pos_embed.norm().item() == pytest.approx(float(golden["model_dec_pos_embed_norm"]), rel=1e-6)
    rows = model.mask.view(8, 16, 8, 16)
    np.testing.assert_array_equal(rows[:, 0, :, 0].numpy(), golden["mask_rows"])
    assert (rows == rows[:, :1, :, :1]).all()


@pytest.mark.parametrize("tag", [tag for tag in ZOO if ZOO[tag]["arch"] == "arm_pretrain"])
def test_arm_latents_and_predictions(tag: str, golden_weights) -> None:
    golden, model = np.load(GOLDEN / f"{tag}.npz"), golden_weights.fill(build(ZOO[tag]), tag)
    with torch.no_grad():
        latents = model.encode(golden_weights.standard_normal(tuple(ZOO[tag]["input"]), tag + "/input"))
        prediction = model.decode(latents)
    np.testing.assert_allclose(latents[:, ::8, :8].numpy(), golden["latent_slice"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(prediction[:, ::8, :16].numpy(), golden["prediction_slice"], rtol=0, atol=2e-4)
    assert prediction.norm().item() == pytest.approx(float(golden["prediction_norm"]), rel=1e-4)


@pytest.mark.parametrize("tag", [tag for tag in SMALL if ZOO[tag]["arch"] == "mambar"])
def test_registers(tag: str, golden_weights) -> None:
    """Positions of the registers, and what the head reads."""
    golden, model = np.load(GOLDEN / f"{tag}.npz"), golden_weights.fill(build(ZOO[tag]), tag)
    assert model.token_layout.positions == golden["register_positions"].tolist()
    with torch.no_grad():
        tokens = model.forward_features(golden_weights.standard_normal(tuple(ZOO[tag]["input"]), tag + "/input"))
        features = model.forward_head(tokens, pre_logits=True)
    np.testing.assert_allclose(features.numpy(), golden["features"], rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("tag", SMALL)
def test_gpu(tag: str, backend: str | None, golden_weights) -> None:
    """The same tolerances, with float32 products in full precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with use_backend(backend):
        compare(tag, golden_weights, torch.float32, 2e-5, device="cuda")
