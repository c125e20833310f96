"""Detection by torchvision and segmentation by transformers: data, models, loop and command lines."""

# ruff: noqa: E402
# The skip comes before imports that need what may be missing.

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

for package in ("torchmetrics", "pycocotools", "transformers", "accelerate"):
    pytest.importorskip(package, reason="needs the extra dense")

from vim.dense import shapes
from vim.dense.standalone import cli, training
from vim.dense.standalone.data import CocoInstances, EndlessSampler, LabelMaps, Seeded
from vim.dense.standalone.detection import Detection, build_mask_rcnn, train_transform
from vim.dense.standalone.hf_backbone import VimPyramid, VimPyramidConfig
from vim.dense.standalone.segmentation import Segmentation, build_mask2former, build_upernet, sliding_logits
from vim.dense.standalone.task import Spec, features_of
from vim.errors import UserError

SMALL = {"patch_size": 8, "stride": 8, "depth": 4}
CLASSES = ["background", *shapes.CLASSES]


def spec(head: str, classes: list[str] = CLASSES) -> Spec:
    return Spec("vim_nano_patch4_32", 64, list(classes), head, 32, jitter=False, model_args=SMALL)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps the precision of a process's first run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, train=8, val=2, size=64)
    return folder


def test_instances_are_those_of_the_annotations(folder):
    data = CocoInstances(folder, "validation")
    notes = json.loads((folder / "annotations" / "instances_validation.json").read_text())["annotations"]
    assert data.classes == list(shapes.CLASSES)
    for i in range(len(data)):
        image, target = data[i]
        own = [n for n in notes if n["image_id"] == i]
        assert (image.shape, image.dtype) == ((3, 64, 64), torch.uint8)
        assert target["labels"].tolist() == [n["category_id"] for n in own]
        assert target["masks"].flatten(1).sum(1).tolist() == [n["area"] for n in own]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (n["bbox"] for n in own)]
        assert target["boxes"].tolist() == corners


def test_categories_are_counted_and_crowds_left_to_evaluation(folder, tmp_path):
    (tmp_path / "images").symlink_to(folder / "images")
    (tmp_path / "annotations").mkdir()
    content = json.loads((folder / "annotations" / "instances_training.json").read_text())
    for category in content["categories"]:
        category["id"] *= 10
    for note in content["annotations"]:
        note["category_id"] *= 10
        note["iscrowd"] = int(note["image_id"] == 0)
    (tmp_path / "annotations" / "instances_training.json").write_text(json.dumps(content))
    plain, crowds = CocoInstances(tmp_path, "training"), CocoInstances(tmp_path, "training", crowds=True)
    assert plain[0][1]["masks"].shape == (0, 64, 64)
    assert crowds[0][1]["iscrowd"].all()
    assert set(plain[1][1]["labels"].tolist()) <= {1, 2, 3}


def test_jitter_keeps_boxes_on_their_masks(folder):
    data = CocoInstances(folder, "training", train_transform(80, jitter=True))
    seen = 0
    for position in range(12):
        image, target = Seeded(data, 0)[position, position % 8]
        assert image.shape == (3, 80, 80)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            seen += 1
    assert seen > 5


def test_labels_count_from_zero_and_zero_is_ignored(folder, tmp_path):
    _, labels = LabelMaps(folder, "training")[0]
    stored = np.asarray(Image.open(folder / "annotations" / "training" / "0000.png")).astype(int)
    assert (labels.numpy() == stored - 1).all()
    (tmp_path / "images" / "training").mkdir(parents=True)
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t.1\t1\t1\twall\n2\t.1\t1\t1\tsky, air\n"
    )
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "images" / "training" / "a.jpg")
    for value, match in ((2, None), (3, "has the label 3, but 2 classes")):
        pixels = np.array([[0, 1], [1, value]], np.uint8)
        Image.fromarray(pixels).save(tmp_path / "annotations" / "training" / "a.png")
        data = LabelMaps(tmp_path, "training")
        assert data.classes == ["wall", "sky"]
        if match is None:
            assert data[0][1].tolist() == [[255, 0], [0, 1]]
        else:
            with pytest.raises(UserError, match=match):
                data[0]


def test_the_order_goes_on_where_it_stopped():
    import itertools

    whole = list(itertools.islice(EndlessSampler(5, 3), 20))
    assert list(itertools.islice(EndlessSampler(5, 3, start=7), 13)) == whole[7:]
    assert sorted(i for _, i in whole[5:10]) == list(range(5)), "every epoch sees all"
    shares = [list(itertools.islice(EndlessSampler(5, 3, 0, rank, 2), 10)) for rank in range(2)]
    assert sorted(itertools.chain(*shares)) == whole


def test_mask_rcnn_sees_the_pyramid():
    model = build_mask_rcnn(spec("mask-rcnn", shapes.CLASSES)).eval()
    assert model.backbone.strides == [4, 8, 16]
    maps = model.backbone(torch.randn(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps.values()] == [(32, 16, 16), (32, 8, 8), (32, 4, 4)]
    with torch.no_grad():
        (found,) = model([torch.rand(3, 50, 70)])
    assert found["masks"].shape[1:] == (1, 50, 70)
    large = Spec("vim_tiny_patch16_224", 64, ["a"], "mask-rcnn", 256, model_args={"depth": 1})
    assert build_mask_rcnn(large).backbone.strides == [4, 8, 16, 32, 64]


@pytest.mark.parametrize("build", [build_upernet, build_mask2former])
def test_transformers_take_the_backbone_with_its_own_weights(build):
    model = build(spec("upernet"))
    torch.manual_seed(0)
    alone = VimPyramid(VimPyramidConfig("vim_nano_patch4_32", 64, model_args=SMALL))
    _, features = features_of(model)
    assert features.out_indices == [0, 1, 2, 3]
    # What transformers would draw anew: it would lose the structure of the scan's parameters.
    for name in ("A_log", "D", "dt_proj.bias"):
        own = features.vim.state_dict()[f"layers.0.mixer.{name}"]
        if name == "dt_proj.bias":
            assert own.std() > 0.1
        else:
            assert torch.equal(own, alone.features.vim.state_dict()[f"layers.0.mixer.{name}"])
    outputs = alone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [m.shape[1:] for m in outputs] == [(64, 16, 24), (64, 8, 12), (64, 4, 6), (64, 2, 3)]


def test_auto_classes_know_the_backbone(tmp_path):
    from transformers import AutoBackbone, UperNetForSemanticSegmentation

    alone = AutoBackbone.from_config(VimPyramidConfig("vim_nano_patch4_32", 64, model_args=SMALL, out_indices=[1, 3]))
    maps = alone(torch.randn(1, 3, 64, 64)).feature_maps
    assert [m.shape[-1] for m in maps] == [8, 2]
    assert alone.channels == [64, 64]
    model = build_upernet(spec("upernet")).eval()
    model.save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # Weights at another address may take another kernel of the convolution: sums in another order.
        torch.testing.assert_close(model(x).logits, again(x).logits)


def test_windows_cover_an_image():
    class Positions(torch.nn.Module):
        """Gives each pixel its own value: windows must be put back where they were cut."""

        def forward(self, pixel_values):
            return type("Outputs", (), {"logits": pixel_values[:, :2]})

    image = torch.randn(1, 3, 50, 131)
    torch.testing.assert_close(sliding_logits(Positions(), image, 64), image[:, :2])


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("det", [], "--data is missing"),
        ("det", ["--data", "/nowhere"], "there is no data set at /nowhere"),
        ("det", ["--data", "{folder}", "--lr", "0"], "--lr is 0, expected a number above 0"),
        ("det", ["--data", "{folder}", "--amp", "half"], "--amp is 'half', expected one of no, bf16, fp16"),
        ("seg", ["--data", "{folder}", "--head", "fcn"], "expected one of upernet, mask2former"),
        ("seg", ["--data", "{folder}/images"], "has no folder images/training"),
        ("det", ["--data", "{folder}/images"], "has no annotation file"),
        ("seg", ["--data", "{folder}", "--arch", "resnet50"], "arch is 'resnet50'"),
        ("seg", ["--data", "{folder}", "--arch", "vim_nano_patch4_32", "--model-kwargs", "depth=3"], "has 3 blocks"),
        ("seg", ["--data", "{folder}", "--finetune", "/nowhere.pth"], "there is no checkpoint at /nowhere.pth"),
        ("seg", ["--data", "{folder}", "--eval", "--checkpoint", "/nowhere.pth"], "train first"),
        ("det", ["--demo", "{folder}/classes.txt"], "cannot be read as an image"),
    ],
)
def test_mistakes_are_said_in_a_sentence(task, flags, message, folder, tmp_path):
    argv = [flag.replace("{folder}", str(folder)) for flag in flags]
    small = ["--img-size", "64", "--width", "32", "--output-dir", str(tmp_path / "run")]
    with pytest.raises((UserError, training.CheckpointError), match=message):
        cli.run(task, argv + small)
    assert not (tmp_path / "run").exists()


def flags_of(folder: Path, out: Path, *more: object) -> list[str]:
    """A few steps of a small model."""
    return [
        "--data", str(folder), "--arch", "vim_nano_patch4_32", "--model-kwargs", "patch_size=8", "stride=8", "depth=4",
        "--img-size", "64", "--width", "32", "--batch-size", "2", "--iterations", "3", "--warmup", "1", "--num-workers",
        "0", "--output-dir", str(out), *map(str, more),
    ]  # fmt: skip


@pytest.mark.slow
def test_detection_trains_evaluates_and_draws(folder, tmp_path, capsys):
    torch.manual_seed(0)
    classifier = timm.create_model("vim_nano_patch4_32", patch_size=8, stride=8, depth=4)
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pth")
    metrics = cli.run("det", flags_of(folder, tmp_path / "run", "--finetune", tmp_path / "c.pth", "--lr", "1e-9"))
    assert {"box_mAP", "box_mAP50", "mask_mAP50"} <= set(metrics)
    state = training.read(tmp_path / "run" / "checkpoint.pth")["model"]
    own = state["backbone.features.vim.layers.0.mixer.in_proj.weight"]
    torch.testing.assert_close(own, classifier.state_dict()["layers.0.mixer.in_proj.weight"], atol=1e-6, rtol=0)
    evaluated = cli.run("det", ["--data", str(folder), "--eval", "--output-dir", str(tmp_path / "run")])
    assert evaluated == pytest.approx(metrics)
    picture, out = folder / "images" / "validation" / "0000.jpg", tmp_path / "drawn.png"
    shown = ["--demo", str(picture), "--out", str(out), "--score", "0", "--output-dir", str(tmp_path / "run")]
    cli.run("det", shown)
    assert Image.open(out).size == (64, 64)
    assert "wrote" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_undisturbed_one(folder, tmp_path, monkeypatch):
    whole = cli.run("seg", flags_of(folder, tmp_path / "whole"))
    step = training.Trainer._one_step

    def killed(self, batch):
        losses = step(self, batch)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_one_step", killed)
        cli.run("seg", flags_of(folder, tmp_path / "cut"))
    assert training.read(tmp_path / "cut" / "checkpoint.pth")["step"] == 2
    with pytest.raises(UserError, match="already holds a run"):
        cli.run("seg", flags_of(folder, tmp_path / "cut"))
    assert cli.run("seg", flags_of(folder, tmp_path / "cut", "--resume")) == whole
    ends = [training.read(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "cut")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    with pytest.raises(UserError, match="other classes than the flags"):
        cli.run("seg", [*flags_of(folder, tmp_path / "cut", "--resume"), "--width", "48"])


@pytest.mark.slow
def test_mask2former_learns_and_a_broken_loss_is_said(folder, tmp_path):
    metrics = cli.run("seg", flags_of(folder, tmp_path / "run", "--head", "mask2former", "--amp", "bf16"))
    assert 0 <= metrics["mIoU"] <= 100
    with pytest.raises(UserError, match="pass a smaller --lr"):
        cli.run("seg", flags_of(folder, tmp_path / "broken", "--amp", "bf16", "--lr", "1e30"))


@pytest.mark.slow
def test_two_processes_share_images_and_metrics(folder, tmp_path):
    """Three validation images for two processes: the metrics are those of one process over all."""
    shapes.write(tmp_path / "data", train=4, val=3, size=64)
    root = Path(__file__).parents[2]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        root / "det" / "torchvision_train.py",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command), *flags_of(tmp_path / "data", tmp_path / "run")],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        text=True, capture_output=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = training.read(tmp_path / "run" / "checkpoint.pth")["metrics"]
    evaluated = cli.run("det", ["--data", str(tmp_path / "data"), "--eval", "--output-dir", str(tmp_path / "run")])
    assert evaluated == pytest.approx(metrics)


def test_tasks_name_their_metric():
    assert (Detection.metric, Segmentation.metric) == ("box_mAP", "mIoU")
