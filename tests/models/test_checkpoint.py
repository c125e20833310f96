"""Everything that exists loads, through every door; what cannot is refused with one sentence."""

import argparse
import json
import logging
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import save_for_hf

from vim.models import CheckpointError, extract_state_dict, load_checkpoint, load_into

NANO = "vim_nano_patch4_32"
PUBLISHED = {
    n: timm.get_pretrained_cfg(n) for n in timm.list_models("vim_*", exclude_filters="*layernorm*") if "nano" not in n
}


@pytest.fixture(scope="module")
def nano() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NANO).eval()


@pytest.fixture
def fresh() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model(NANO).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.zeros_like(v) for k, v in state.items()}


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in state.items()}


def published_file(state: dict[str, torch.Tensor], *, ema: dict[str, torch.Tensor] | None = None) -> dict:
    """The format of the published `.pth` files: FACTS lists its keys."""
    file = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"t_in_epochs": True, "base_values": [1e-3]},
        "epoch": 299,
        "scaler": {"scale": 65536.0, "growth_tracker": 12},
        "args": argparse.Namespace(lr=1e-3, model="vim", batch_size=64, repeated_aug=True, decay_rate=None),
    }  # fmt: skip
    return file if ema is None else {**file, "model_ema": ema}


FORMS = {
    "published": lambda s: published_file(s),
    "published with EMA": lambda s: published_file(s, ema=zeros(s)),
    "plain": lambda s: s,
    "DDP": lambda s: {"model": prefixed(s, "module.")},
    "compiled": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "compiled DDP": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "timm": lambda s: {"epoch": 3, "arch": NANO, "state_dict": s, "args": argparse.Namespace(lr=1.0), "version": 2},
    "own": lambda s: {"format": 1, "model": s, "epoch": 3, "rng": {"cpu": torch.get_rng_state()}, "args": {"lr": 1.0}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads(form, nano, fresh, x, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(FORMS[form](nano.state_dict()), path)
    assert not torch.equal(fresh(x), nano(x))
    assert load_into(fresh, extract_state_dict(load_checkpoint(path))) == []
    assert torch.equal(fresh(x), nano(x))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_through_timm(form, nano, x, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(FORMS[form](nano.state_dict()), path)
    model = timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay={"file": str(path)}).eval()
    assert torch.equal(model(x), nano(x))
    assert "state_dict" not in model.pretrained_cfg


def test_safetensors_and_ema(nano, fresh, x, tmp_path):
    safetensors.torch.save_file(nano.state_dict(), tmp_path / "weights.safetensors")
    load_into(fresh, load_checkpoint(tmp_path / "weights.safetensors"))
    assert torch.equal(fresh(x), nano(x))
    ema = {"model": zeros(nano.state_dict()), "model_ema": prefixed(nano.state_dict(), "module.")}
    load_into(fresh, extract_state_dict(ema))
    assert not torch.equal(fresh(x), nano(x))
    load_into(fresh, extract_state_dict(ema, use_ema=True))
    assert torch.equal(fresh(x), nano(x))
    with pytest.raises(CheckpointError, match="no EMA weights"):
        extract_state_dict({"model": nano.state_dict()}, use_ema=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_load_by_name_and_tag(name, tmp_path, monkeypatch):
    """A file with the published name in torch's checkpoint folder is what `pretrained=True` finds; no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    source = timm.create_model(name, depth=2).eval()
    ema = {k: v + 1 for k, v in source.state_dict().items()}
    torch.save(published_file(source.state_dict(), ema=ema), folder / PUBLISHED[name].hf_hub_filename)
    # The base model's accuracy is its averaged weights'.
    expected = ema if name.startswith("vim_base") else source.state_dict()
    for full_name in (name, f"{name}.{PUBLISHED[name].tag}"):
        loaded = timm.create_model(full_name, pretrained=True, depth=2).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in expected.items())
    other = timm.create_model(name, pretrained=True, depth=2, in_chans=1, num_classes=5, img_size=(64, 96))
    assert torch.equal(other.layers[1].mixer.A_log, expected["layers.1.mixer.A_log"])
    assert other.patch_embed.proj.weight.shape[1] == 1
    maps = timm.create_model(name, pretrained=True, depth=2, features_only=True, out_indices=[1])
    assert torch.equal(maps.model.layers[1].mixer.D, expected["layers.1.mixer.D"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_offline_says_which_file_goes_where(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        timm.create_model(name, pretrained=True, depth=1)
    message = str(caught.value)
    for words in (PUBLISHED[name].hf_hub_filename, PUBLISHED[name].hf_hub_id, str(tmp_path), "pretrained_cfg_overlay"):
        assert words in message
    assert "\n" not in message


def test_hub_ids(nano, x, tmp_path, monkeypatch):
    torch.save(published_file(nano.state_dict()), tmp_path / "vim.pth")
    safetensors.torch.save_file(nano.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repository, filename, revision=None, **kwargs):
        asked.append((repository, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in ("hf-hub:me/vim/vim.pth", "hf-hub:me/vim@v2/vim.pth", "hf-hub:me/vim"):
        state = extract_state_dict(load_checkpoint(source))
        assert torch.equal(state["cls_token"], nano.cls_token)
    assert asked == [("me/vim", "vim.pth", None), ("me/vim", "vim.pth", "v2"), ("me/vim", "model.safetensors", None)]
    with pytest.raises(CheckpointError, match="hub id"):
        load_checkpoint("hf-hub:vim")


def test_no_published_weights_is_said():
    with pytest.raises(CheckpointError, match="pretrained=False"):
        timm.create_model(NANO, pretrained=True)


@pytest.mark.parametrize("img_size", [32, (16, 40)])
def test_timm_export_round_trip(img_size, nano, tmp_path):
    """timm's own model folder (config.json and safetensors), also of a resized model."""
    model = timm.create_model(NANO, img_size=img_size, num_classes=4).eval()
    save_for_hf(model, tmp_path, model_args={"img_size": img_size})
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == NANO
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    assert torch.equal(again(images), model(images))


def test_timm_export_of_a_changed_model(tmp_path):
    """The folder records what was changed after construction, and its weights fit other sizes again."""
    torch.manual_seed(0)
    model = timm.create_model(NANO, in_chans=1).eval()
    model.set_input_size((24, 48))
    model.reset_classifier(7, "avg")
    assert resolve_input_data_config(model)["input_size"] == (1, 24, 48)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 1, 24, 48)
    assert torch.equal(again(images), model(images))
    square = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=32)
    assert torch.equal(square.pos_embed[:, 32], model.pos_embed[:, 36])


def test_wrong_head_is_reset_with_a_notice(nano, caplog):
    model = timm.create_model(NANO, num_classes=3)
    head = model.head.weight.clone()
    with caplog.at_level(logging.WARNING, "vision_mamba"):
        assert load_into(model, nano.state_dict()) == ["head.bias", "head.weight"]
    assert "head.weight has shape (10, 64) in the checkpoint and (3, 64) in the model" in caplog.text
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm_f.weight, nano.norm_f.weight)
    with pytest.raises(CheckpointError, match=r"head\.weight \(10, 64\) instead of \(3, 64\)"):
        load_into(model, nano.state_dict(), reset_head=False)
    assert load_into(timm.create_model(NANO, num_classes=0), nano.state_dict()) == ["head.bias", "head.weight"]


def test_wrong_head_is_reset_through_timm_with_a_notice(nano, tmp_path, caplog):
    torch.save({"model": nano.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    with caplog.at_level(logging.WARNING, "vision_mamba"):
        model = timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert "head has 10 classes, the model 3" in caplog.text
    assert torch.equal(model.cls_token, nano.cls_token)
    assert model.head.weight.shape == (3, 64)


def test_missing_and_unexpected_are_listed(nano, fresh, tmp_path, caplog):
    state = nano.state_dict()
    state["surplus.weight"] = state.pop("layers.0.mixer.D_b")
    with pytest.raises(CheckpointError, match=r"missing: layers\.0\.mixer\.D_b; unexpected: surplus\.weight"):
        load_into(fresh, state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.D_b.*surplus\.weight") as caught:
        timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")})
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "vision_mamba"):
        assert load_into(fresh, state, strict=False) == ["layers.0.mixer.D_b", "surplus.weight"]
    assert "surplus.weight" in caplog.text
    with pytest.raises(CheckpointError, match="does not fit this"):
        load_into(timm.create_model(NANO, embed_dim=32), nano.state_dict())


def test_grid_of_a_rectangle_can_be_given(nano):
    wide = timm.create_model(NANO, img_size=(16, 32))
    with pytest.raises(CheckpointError, match="square"):
        load_into(timm.create_model(NANO, img_size=20), wide.state_dict())
    square = timm.create_model(NANO)
    load_into(square, wide.state_dict(), grid=(4, 8))
    assert torch.equal(square.pos_embed[:, 32], wide.pos_embed[:, 16])


class Evil:
    """Pickles to a call."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.save", "bare pickle"])
def test_code_in_a_checkpoint_is_refused(wrapped, nano, tmp_path):
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    content = {"model": nano.state_dict() if wrapped else {}, "args": Evil(touched)}
    if wrapped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    for load in (
        lambda: load_checkpoint(path),
        lambda: timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay={"file": str(path)}),
    ):
        with pytest.raises(CheckpointError, match="could run code") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not touched.exists()


def test_namespace_is_plain_data(tmp_path):
    """A Namespace may hold plain values; what else it holds is refused like anywhere."""
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(x=[1, {"y": "z"}])}, tmp_path / "good.pth")
    assert load_checkpoint(tmp_path / "good.pth")["args"].x == [1, {"y": "z"}]
    torch.save({"model": {}, "args": argparse.Namespace(x=Evil(tmp_path / "touched"))}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "damage", ["truncated", "text", "empty", "list", "no weights", "absent", "truncated.safetensors"]
)
def test_what_is_no_checkpoint(damage, nano, tmp_path):
    path = tmp_path / ("w.safetensors" if "safetensors" in damage else "w.pth")
    if damage == "truncated":
        torch.save(nano.state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "truncated.safetensors":
        safetensors.torch.save_file(nano.state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "text":
        path.write_text("<html>404</html>")
    elif damage == "empty":
        path.touch()
    elif damage == "list":
        torch.save([torch.ones(1)], path)
    elif damage == "no weights":
        torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError) as caught:
        extract_state_dict(load_checkpoint(path))
    assert "\n" not in str(caught.value)
    assert "epoch" in str(caught.value) if damage == "no weights" else path.name in str(caught.value)


def test_types_that_others_allowed_stay_allowed(tmp_path):
    """mmengine reads with torch.load what this loader reads too; neither may take the other's permission away."""
    from vim.models.unpickling import DATA_TYPES

    before = torch.serialization.get_safe_globals()
    torch.save({"model": {}}, tmp_path / "c.pth")
    try:
        torch.serialization.add_safe_globals(DATA_TYPES[:3])
        load_checkpoint(tmp_path / "c.pth")
        assert all(kind in torch.serialization.get_safe_globals() for kind in DATA_TYPES[:3])
        assert DATA_TYPES[3] not in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
