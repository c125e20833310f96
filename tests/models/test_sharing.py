"""A model goes to Hugging Face's hub and comes back: through timm, and through transformers' wrapper of timm."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf

import vim  # noqa: F401  registers the models


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vim_nano_patch4_32", depth=2, num_classes=3).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_push_and_load(model, images, tmp_path: Path, monkeypatch) -> None:
    """The hub is a folder here: what would be uploaded is copied there."""
    folder = tmp_path / "hub"

    class Hub:
        def __init__(self, **options) -> None: ...

        def create_repo(self, repo_id: str, **options) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **options) -> bool:
            return False

        def upload_folder(self, folder_path: str, **options) -> None:
            shutil.copytree(folder_path, folder)

    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    push_to_hf_hub(model, "someone/vim-nano", model_args={"depth": 2}, safe_serialization=True)
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in folder.iterdir()}
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, depth=2).eval()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_transformers(model, images, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    save_for_hf(model, str(tmp_path), model_args={"depth": 2}, safe_serialization=True)
    # As docs/deploy.md says: timm saves the number of classes twice, and transformers takes it once, for any model.
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config))
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = wrapped(pixel_values=images).logits
        assert torch.equal(found, model(images))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert processor(torch.zeros(3, 40, 40), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
