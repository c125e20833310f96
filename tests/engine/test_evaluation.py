"""`--eval`: figures against counts made here, per class, on a subset of the classes, at another size and crop."""

import csv
import json
import shutil

import pytest
import timm
import torch

from vim.data import build_datasets
from vim.engine import run
from vim.engine.arguments import parse_args
from vim.engine.evaluation import read_class_index
from vim.errors import UserError
from vim.models import load_into

CLASSES = 7
NANO = (
    "--model",
    "vim_nano_patch4_32",
    "--input-size",
    "32",
    "--batch-size",
    "4",
    "--num_workers",
    "0",
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of 7 classes and another one as its average, as a published file holds them."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    states = []
    for _ in range(2):
        model = timm.create_model("vim_nano_patch4_32", num_classes=CLASSES)
        # A head of some size, so that predictions are spread over the classes.
        torch.nn.init.normal_(model.head.weight)
        states.append(model.state_dict())
    torch.save({"model": states[0], "model_ema": states[1]}, path)
    return path


@pytest.fixture(scope="module")
def seven(tree, tmp_path_factory):
    """The synthetic tree's evaluation images in seven class folders."""
    root = tmp_path_factory.mktemp("seven")
    files = sorted(tree.glob("val/*/*.jpg"))
    for k in range(CLASSES):
        for split in ("train", "val"):
            folder = root / split / f"n{k}"
            folder.mkdir(parents=True)
            for i in range(1 + k % 3):
                shutil.copy(files[(3 * k + i) % len(files)], folder / f"{i}.jpg")
    return root


def logits_and_targets(checkpoint, root, *argv, key="model"):
    """Logits of the whole set in one batch, made without the engine's evaluation."""
    args = parse_args([*NANO, "--data-path", str(root), "--eval", "--resume", "x", *map(str, argv)])
    _, data, _ = build_datasets(args)
    model = timm.create_model("vim_nano_patch4_32", num_classes=CLASSES, img_size=args.input_size)
    load_into(model, torch.load(checkpoint, weights_only=True)[key])
    images = torch.stack([data[i][0] for i in range(len(data))])
    with torch.no_grad():
        return model.eval()(images), torch.tensor([data[i][1] for i in range(len(data))]), data.classes


def evaluated(checkpoint, root, *argv):
    return run.run([*NANO, "--data-path", str(root), "--eval", "--resume", str(checkpoint), *map(str, argv)])


def percent(hits):
    return pytest.approx(100 * hits.double().mean().item())


def test_figures(checkpoint, seven, capsys):
    """Top-1, top-5 and loss of the weights and of their average."""
    record = evaluated(checkpoint, seven)
    for key, prefix in (("model", ""), ("model_ema", "ema_")):
        logits, targets, _ = logits_and_targets(checkpoint, seven, key=key)
        ranks = (logits > logits[torch.arange(len(targets)), targets][:, None]).sum(1)
        assert record[f"{prefix}test_acc1"] == percent(ranks < 1)
        assert record[f"{prefix}test_acc5"] == percent(ranks < 5)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        assert record[f"{prefix}test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["test_acc5"] > record["test_acc1"]
    assert record["test_images"] == len(targets) == 13
    assert record["test_images_per_s"] > 0
    out = capsys.readouterr().out
    assert "13 test images: top-1" in out
    assert "13 test images, averaged weights: top-1" in out
    assert json.loads(out.splitlines()[-1]) == record


def test_per_class_csv(checkpoint, seven, tmp_path):
    evaluated(checkpoint, seven, "--per-class-csv", tmp_path / "classes.csv")
    logits, targets, classes = logits_and_targets(checkpoint, seven)
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == classes
    for k, row in enumerate(rows):
        mine = logits[targets == k]
        assert int(row["images"]) == len(mine)
        assert float(row["top1_percent"]) == pytest.approx(100 * (mine.argmax(1) == k).double().mean().item(), abs=1e-3)
        best = mine.topk(5).indices == k
        assert float(row["top5_percent"]) == pytest.approx(100 * best.any(1).double().mean().item(), abs=1e-3)


@pytest.mark.parametrize("form", ["txt", "mapping.json", "imagenet.json"])
def test_subset_of_the_classes(checkpoint, seven, tmp_path, form):
    """Folders of three of the model's classes, in another order: the other classes' outputs are left out."""
    subset = {"aa": 5, "bb": 2, "cc": 6}
    root = tmp_path / "subset"
    for name, number in subset.items():
        shutil.copytree(seven / "val" / f"n{number}", root / name)
    index = tmp_path / form
    if form == "txt":
        index.write_text("".join(f"{name} {number}\n" for name, number in subset.items()) + "dd 0\n")
    elif form == "mapping.json":
        index.write_text(json.dumps(subset))
    else:
        index.write_text(json.dumps({str(number): [name, "a word"] for name, number in subset.items()}))
    table = tmp_path / "classes.csv"
    record = evaluated(checkpoint, root, "--class-index", index, "--per-class-csv", table, "--num-classes", CLASSES)
    logits, targets, classes = logits_and_targets(checkpoint, root)
    columns = [subset[name] for name in classes]
    assert record["test_acc1"] == percent(logits[:, columns].argmax(1) == targets)
    assert record["test_images"] == len(targets)
    assert evaluated(checkpoint, root, "--class-index", index)["test_acc1"] == record["test_acc1"]
    with table.open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["aa", "bb", "cc"]


def test_class_index_that_does_not_fit(tmp_path):
    path = tmp_path / "index.txt"
    for text, words in (
        ("a 0", "lacks 1 of the set's folders, b"),
        ("a 0\nb 9", "has class 9"),
        ("a 0\nb x", "cannot be read"),
        ("a", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_class_index(path, ["a", "b"], 7)
    with pytest.raises(UserError, match="cannot be read"):
        read_class_index(tmp_path / "absent.txt", ["a"], 7)
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="cannot be read"):
        read_class_index(tmp_path / "list.json", ["a"], 7)


@pytest.mark.parametrize(
    "flags", [("--input-size", 48), ("--eval-crop-ratio", 0.5), ("--input-size", 40, "--eval-crop-ratio", 1)]
)
def test_other_size_and_crop(checkpoint, seven, flags):
    """Another test-time image size resamples the position embedding; the crop is the one asked for."""
    logits, targets, _ = logits_and_targets(checkpoint, seven, *flags)
    record = evaluated(checkpoint, seven, *flags)
    assert record["test_acc1"] == percent(logits.argmax(1) == targets)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert record["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["test_loss"] != evaluated(checkpoint, seven)["test_loss"]


def test_what_belongs_to_an_evaluation():
    for flags in (("--per-class-csv", "x"), ("--class-index", "x")):
        with pytest.raises(UserError, match="pass --eval too"):
            parse_args([*NANO, *flags])
