"""benchmarks/study.py: every arm can be built, figures are those of the rows, a run ends and is continued."""

import csv

import pytest
import study
import timm
import torch
from PIL import Image

import vim  # noqa: F401  registers the models

ARMS = [(name, arm) for name, arms in study.STUDIES.items() for arm in arms]


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_every_arm_is_a_model(name: str, arm: str) -> None:
    model, options = study.STUDIES[name][arm]
    built = timm.create_model(model, img_size=28, in_chans=1, num_classes=10, **options).eval()
    with torch.no_grad():
        assert built(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    if name == "deit":  # the same size, within two percent
        assert sum(p.numel() for p in built.parameters()) == pytest.approx(252_000, rel=0.02)


def test_equal_time_and_equal_epochs() -> None:
    def rows(arm, seconds, accuracies):
        return [
            {"study": "deit", "arm": arm, "seed": "0", "epochs": "3", "epoch": str(k + 1), "top1": str(a),
             "train_s": str((k + 1) * seconds)}
            for k, a in enumerate(accuracies)
        ]  # fmt: skip

    found = rows("Vim", 2.0, [50, 70, 80]) + rows("DeiT", 1.0, [40, 50, 60])
    assert study.last_epochs(found, "deit") == {"Vim": [80.0], "DeiT": [60.0]}
    assert study.at_equal_time(found) == {"Vim": [50.0], "DeiT": [60.0]}


def test_the_published_model_is_trained_once_a_seed(tmp_path, monkeypatch) -> None:
    trained = []

    def train(model, options, seed, args, folder):
        trained.append((model, str(options), seed))
        return [{"epoch": k + 1, "top1": 80.0 + k, "train_s": 2.0 * (k + 1)} for k in range(2)]

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "draw", lambda rows, path: None)  # a picture takes a second
    argv = ["--epochs", "2", "--out", str(tmp_path), "--seeds", "0", "1"]
    assert study.main([*argv, "--only", "direction"]) == 0
    assert study.main(argv) == 0
    assert len(trained) == len(set(trained)) == 2 * 9  # of 11 arms three are the published model
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 11 * 2
    assert {row["top1"] for row in rows if row["arm"] == "Vim"} == {"80", "81"}


@pytest.mark.slow
def test_a_run_is_written_once(tmp_path, capsys) -> None:
    argv = ["--only", "class-token", "--arms", "head", "--seeds", "3", "--epochs", "1", "--out", str(tmp_path)]
    small = ["--batch-size", "500", "--model-kwargs", "use_middle_cls_token=false", "depth=1"]
    assert study.main([*argv, *small]) == 0
    with (tmp_path / "study.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["arm"], row["seed"], row["epoch"]) == ("head", "3", "1")
    assert float(row["top1"]) > 5
    assert min(Image.open(tmp_path / "study.png").size) > 300
    assert study.main([*argv, *small]) == 0
    assert capsys.readouterr().out.count("== class-token") == 1
    assert study.main([*argv[:-4], "--epochs", "2", "--out", str(tmp_path)]) == 2
