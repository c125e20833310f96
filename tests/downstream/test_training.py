"""Real learning through mmengine's Runner and the real metrics, and what grows out of a trained model."""

import numpy as np
import pytest
from PIL import Image

# Each run takes two to three minutes on two idle cores; slower machines get more.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1700)]


def mean_loss(losses: dict[int, float], first: int, last: int) -> float:
    return float(np.mean([loss for i, loss in losses.items() if first < i <= last]))


def test_segmentation_is_learnt(trained_seg):
    assert trained_seg.metrics["mIoU"] >= 60


def test_detection_is_learnt(trained_det):
    assert trained_det.metrics["coco/bbox_mAP_50"] >= 0.5
    assert trained_det.metrics["coco/segm_mAP_50"] >= 0.4


@pytest.mark.parametrize("task", ["seg", "det"])
def test_resuming_continues_the_curve(task, train_shapes, trained_seg, trained_det):
    """From the checkpoint at half time: the same learning rates, and losses where the whole run had them."""
    whole = {"seg": trained_seg, "det": trained_det}[task]
    end = max(whole.losses)
    half, stop = end // 2, end // 2 + 40
    # The run is cut short by its loop alone; the schedule is the whole run's.
    resumed = train_shapes(
        task, "--resume", whole.checkpoint(half),
        "--cfg-options", f"train_cfg.max_iters={stop}", f"train_cfg.val_interval={end}",
    )  # fmt: skip
    assert min(resumed.losses) == half + 10, "iterations count on"
    for i, rate in resumed.rates.items():
        assert rate == pytest.approx(whole.rates[i], rel=1e-6)
    continued, expected = mean_loss(resumed.losses, half, stop), mean_loss(whole.losses, half, stop)
    # Augmentation and dropout draw other numbers, so means of 40 batches differ a little; a fresh start's first 40 are
    # more than twice as high.
    assert continued == pytest.approx(expected, rel=0.3)
    assert continued < 0.65 * mean_loss(whole.losses, 0, 40)


def test_evaluation_repeats_the_figure(trained_seg, shapes, train_shapes, run_tool, tmp_path):
    end = max(trained_seg.losses)
    done = run_tool(
        "seg/test.py", train_shapes.configs["seg"], trained_seg.checkpoint(end), "--data-root", shapes,
        "--work-dir", tmp_path, "--show-dir", tmp_path / "drawn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"mIoU: {trained_seg.metrics['mIoU']:.4f}" in done.stdout + done.stderr
    assert list((tmp_path / "drawn").rglob("*.png")) + list((tmp_path / "drawn").rglob("*.jpg"))


def test_several_scales_and_mirror_images_help_or_keep(trained_seg, shapes, train_shapes, run_tool, tmp_path):
    """Sliding windows at six scales, plain and mirrored, averaged: near the plain figure if the wiring is right."""
    end = max(trained_seg.losses)
    done = run_tool(
        "seg/test.py", train_shapes.configs["seg"], trained_seg.checkpoint(end), "--data-root", shapes, "--tta",
        "--work-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    figure = float((done.stdout + done.stderr).rsplit("mIoU: ", 1)[1].split()[0])
    assert figure >= 50


def test_detection_merges_boxes_of_several_scales(trained_det, shapes, train_shapes, run_tool, tmp_path):
    done = run_tool(
        "det/test.py", train_shapes.configs["det"], trained_det.checkpoint(max(trained_det.losses)), "--data-root",
        shapes, "--tta", "--work-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    figure = float((done.stdout + done.stderr).rsplit("coco/bbox_mAP_50: ", 1)[1].split()[0])
    # Near the plain figure, which the training's test holds to half and more, if boxes are turned back as they should.
    assert figure >= 0.4


@pytest.mark.parametrize("task", ["seg", "det"])
def test_demo_draws_what_was_found(task, trained_seg, trained_det, shapes, train_shapes, run_tool, tmp_path):
    trained = {"seg": trained_seg, "det": trained_det}[task]
    picture, out = shapes / "images" / "validation" / "0000.jpg", tmp_path / "drawn.png"
    done = run_tool(
        f"{task}/demo.py", picture, train_shapes.configs[task], trained.checkpoint(max(trained.losses)), "--out", out
    )
    assert done.returncode == 0, done.stderr[-4000:]
    before, after = np.asarray(Image.open(picture)), np.asarray(Image.open(out).convert("RGB"))
    assert after.shape[:2] == before.shape[:2]
    changed = np.abs(after.astype(int) - before).max(-1) > 40
    assert changed.mean() > 0.02, "something is drawn"
    assert any(name in done.stdout for name in ("disc", "square", "triangle"))
