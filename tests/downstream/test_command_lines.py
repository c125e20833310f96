"""What users get wrong: one sentence each, with the way out; exit status 2 without a traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SEG = "seg/configs/upernet_vim-nano_shapes.py"
DET = "det/configs/mask-rcnn_vim-nano_shapes.py"


@pytest.fixture
def train(monkeypatch, tmp_path):
    from vim.dense import cli

    monkeypatch.chdir(ROOT)
    return lambda config, *flags: cli.train(
        config.split("/")[0], [config, "--work-dir", str(tmp_path / "work"), *map(str, flags)]
    )


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    from vim.dense import cli

    monkeypatch.chdir(ROOT)
    return lambda config, *flags: cli.evaluate(
        config.split("/")[0], [config, *map(str, flags), "--work-dir", str(tmp_path / "work")]
    )


@pytest.fixture
def own_shapes(shapes, tmp_path) -> Path:
    """A copy of the data set that a test may spoil."""
    return Path(shutil.copytree(shapes, tmp_path / "own"))


def user_error(match: str):
    from vim.errors import UserError

    return pytest.raises(UserError, match=match)


@pytest.mark.parametrize("config", [SEG, DET])
def test_missing_data_set(config, train, tmp_path):
    with user_error("there is no data set at .*nowhere: pass --data-root"):
        train(config, "--data-root", tmp_path / "nowhere")


def test_missing_folder(train, own_shapes):
    shutil.rmtree(own_shapes / "annotations" / "validation")
    with user_error("has no folder annotations/validation"):
        train(SEG, "--data-root", own_shapes)


def test_missing_annotation_file(train, own_shapes):
    (own_shapes / "annotations" / "instances_validation.json").unlink()
    with user_error("has no annotation file annotations/instances_validation.json"):
        train(DET, "--data-root", own_shapes)


def test_annotations_that_are_none(train, own_shapes):
    (own_shapes / "annotations" / "instances_training.json").write_text("[]")
    with user_error("is not a COCO annotation file"):
        train(DET, "--data-root", own_shapes)


def test_missing_classes(train, own_shapes):
    file = own_shapes / "annotations" / "instances_training.json"
    content = json.loads(file.read_text())
    content["categories"][1]["name"] = "box"
    file.write_text(json.dumps(content))
    with user_error("has no category square: set metainfo.classes"):
        train(DET, "--data-root", own_shapes)


@pytest.mark.parametrize(
    ("config", "option", "name"),
    [(SEG, "model.decode_head.num_classes=7", "decode_head"), (DET, "model.roi_head.mask_head.num_classes=7", "mask")],
)
def test_heads_of_another_number_of_classes(config, option, name, train, shapes):
    with user_error(f"{name}.* is 7, but .* classes: set it to"):
        train(config, "--data-root", shapes, "--cfg-options", option)


def test_config_that_is_not_there(train):
    with user_error("there is no config at nothing.py: see seg/configs/"):
        from vim.dense import cli

        cli.train("seg", ["nothing.py"])


def test_config_of_the_other_task():
    from vim.dense import cli

    with user_error("is not a config for det"):
        cli.train("det", [str(ROOT / SEG)])


def test_backbone_checkpoint_of_another_width(train, shapes, published):
    from vim.models import CheckpointError

    with pytest.raises(CheckpointError, match="does not fit this"):
        train(SEG, "--data-root", shapes, "--finetune", published("vim_tiny_patch16_224"))


def test_backbone_checkpoint_that_is_not_there(train, shapes):
    from vim.models import CheckpointError

    with pytest.raises(CheckpointError, match=r"there is no checkpoint at nowhere\.pth"):
        train(SEG, "--data-root", shapes, "--finetune", "nowhere.pth")


def test_classifier_given_for_evaluation(evaluate, shapes, published):
    with user_error("was not written by train.py"):
        evaluate(SEG, published("vim_nano_patch4_32"), "--data-root", shapes)


def test_weights_of_another_model_are_not_evaluated(evaluate, shapes, tmp_path):
    """mmengine alone would warn and evaluate initial weights; this is an error."""
    from mmengine.registry import MODELS

    from vim.dense.cli import read_config

    model = MODELS.build(read_config("seg", str(ROOT / SEG)).model)
    state = model.state_dict()
    state["decode_head.conv_seg.weight"] = torch.zeros(9, 32, 1, 1)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "other.pth")
    with user_error(r"conv_seg.weight \(9, 32, 1, 1\) instead of \(4, 32, 1, 1\)"):
        evaluate(SEG, tmp_path / "other.pth", "--data-root", shapes)


def test_checkpoint_with_code_is_refused(evaluate, shapes, tmp_path):
    from vim.models import CheckpointError

    torch.save({"state_dict": {}, "hook": os.system}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="refused"):
        evaluate(SEG, tmp_path / "evil.pth", "--data-root", shapes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it can")
def test_mixed_precision_needs_a_gpu(train, shapes):
    with user_error("--amp bfloat16 needs a GPU"):
        train(SEG, "--data-root", shapes, "--amp")


def test_one_sentence_and_status_2(run_tool):
    done = run_tool("det/train.py", DET, "--data-root", "/nowhere")
    assert done.returncode == 2
    assert "error: there is no data set at /nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_of_something_else_than_a_picture(run_tool, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    done = run_tool("seg/demo.py", tmp_path / "text.jpg", SEG, "none.pth")
    assert done.returncode == 2
    assert "is not an image" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mmcv is not installed: run bash scripts/install_openmmlab.sh"),
        ("__version__ = '2.1.0'", "mmcv's operators cannot be imported"),
    ],
)
def test_missing_operators(content, message, tmp_path):
    """With a stand-in for mmcv before it on the path: none at all, or one without `mmcv.ops`."""
    if content is None:
        code = "import sys; sys.modules['mmcv'] = None; sys.argv[1:] = ['c.py']; "
    else:
        (tmp_path / "mmcv").mkdir()
        (tmp_path / "mmcv" / "__init__.py").write_text(content)
        code = ""
    code += "import sys; from functools import partial; "
    code += "from vim.dense.cli import train; from vim.errors import exit_status; "
    code += "sys.exit(exit_status(partial(train, 'seg', ['c.py'])))"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_benchmark_counts_what_the_backbone_costs(run_tool):
    """The figure is that of the classifier's own count at this size and without class token and head."""
    import timm

    from vim.analysis.flops import count_flops

    done = run_tool("seg/benchmark.py", SEG, "--shape", 64, "--rounds", 1, "--backbone")
    assert done.returncode == 0, done.stderr
    figure = float(done.stdout.split(" GFLOPs")[0].split()[-1])
    model = timm.create_model(
        "vim_nano_patch4_32", img_size=64, patch_size=8, stride=8, num_classes=0, if_cls_token=False,
        use_middle_cls_token=False,
    )  # fmt: skip
    # Printed to three digits; each of the four maps passes the last norm, which counts a little at most.
    assert figure == pytest.approx(count_flops(model) / 1e9, rel=0.05)


def test_benchmark_reports(run_tool):
    done = run_tool("seg/benchmark.py", SEG, "--shape", 64, 96, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert "GFLOPs per image" in done.stdout
