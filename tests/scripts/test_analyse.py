"""`python -m vim.analysis` draws every picture of a trained model, and refuses in one sentence."""

import pytest
from PIL import Image

from vim.analysis.__main__ import PICTURES, main


@pytest.fixture(scope="module")
def checkpoint(train_small):
    return train_small(depth=2)


def test_every_picture(checkpoint, tmp_path, capsys):
    pytest.importorskip("captum", reason="needs the test extra")
    assert main(["all", "--checkpoint", str(checkpoint), "--images", "3", "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(PICTURES)
    for path in tmp_path.iterdir():
        assert min(Image.open(path).size) > 200
    assert len(capsys.readouterr().out.splitlines()) == len(PICTURES)


def test_a_picture_of_ones_own_at_another_size(checkpoint, jpegs, tmp_path, capsys):
    picture = next(jpegs.glob("val/*/*.jpg"))
    argv = ["attention", str(picture), "--layer", "0", "--input-size", "48"]
    assert main([*argv, "--checkpoint", str(checkpoint), "--out", str(tmp_path)]) == 0
    assert "block 0, 2 scans of 145 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["decay", "--layer", "9"], "--layer is 9, expected 0 to 1"),
        (["decay", "--images", "0"], "--images is 0, expected at least 1"),
        (["attention", "missing.jpg"], "missing.jpg"),
    ],
)
def test_refusals(checkpoint, tmp_path, capsys, arguments, sentence):
    assert main([*arguments, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("new/*.png"))
