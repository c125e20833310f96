"""scripts/make_annotated.py, on files laid out as those of the packages."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_annotated.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script's functions, which find packages made of a grey image and of a photograph."""
    images = tmp_path / "stardist" / "data" / "images"
    images.mkdir(parents=True)
    labels = np.zeros((256, 256), np.uint16)
    labels[10:20, 10:30], labels[100:140, 200:210] = 7, 300
    Image.fromarray(labels).save(images / "mask2d.tif")
    Image.fromarray(np.arange(256**2, dtype=np.uint16).reshape(256, 256)).save(images / "img2d.tif")
    (tmp_path / "imgaug").mkdir()
    Image.new("RGB", (90, 60), (9, 200, 9)).save(tmp_path / "imgaug" / "quokka.jpg")
    corners = [{"x": x, "y": y} for x, y in ((30, 15), (59, 15), (59, 44), (30, 44))]
    notes = {"polygons": [{"keypoints": corners}]}
    (tmp_path / "imgaug" / "quokka_annotations.json").write_text(json.dumps(notes))
    for package in ("stardist", "imgaug"):
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('data alone is read')")
    monkeypatch.syspath_prepend(tmp_path)
    return runpy.run_path(str(SCRIPT))


def test_annotations_become_data_sets(script, tmp_path):
    assert script["main"]([str(tmp_path / "out")]) == 0

    def notes(name: str, split: str) -> list:
        return json.loads((tmp_path / "out" / name / "annotations" / f"instances_{split}.json").read_text())[
            "annotations"
        ]

    # The second nucleus lies across two tiles of the right column.
    assert [n["bbox"] for n in notes("nuclei", "training")] == [[10, 10, 20, 10]]
    assert [n["bbox"] for n in notes("nuclei", "validation")] == [[72, 100, 10, 28], [72, 0, 10, 12]]
    assert notes("quokka", "training") == notes("quokka", "validation")
    (outline,) = notes("quokka", "training")
    assert outline["bbox"] == [10, 5, 10, 10]
    labels = np.asarray(Image.open(tmp_path / "out" / "quokka" / "annotations" / "training" / "0000.png"))
    assert (labels == 2).sum() == 100


def test_a_missing_package_is_said(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert script["main"]([str(tmp_path / "out")]) == 2
    assert "stardist is not installed: pip install --no-deps stardist" in capsys.readouterr().err
