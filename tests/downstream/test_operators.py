"""mmcv's operators against the formulas in float64, whichever serves them, and torchvision's against mmcv's own."""

import math

import pytest
import torch
from torch.nn import functional as F

from vim.dense import operators

# One rounding per operation of sums of a few dozen terms of order 1; float32 has 6e-8.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def served() -> bool:
    """Whether torchvision's kernels stand in for mmcv's."""
    import mmcv._ext

    return isinstance(mmcv._ext, operators._Extension)


def boxes_and_scores(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 40
    sides = torch.rand(count, 2, generator=generator) * 30 + 1
    scores = torch.randperm(count, generator=generator).float() / count
    return torch.cat([corners, corners + sides], 1), scores


def greedy(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int) -> list[int]:
    """Non-maximum suppression by its definition, in float64."""

    def area(x1, y1, x2, y2):
        return max(x2 - x1 + offset, 0) * max(y2 - y1 + offset, 0)

    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        a = boxes[i].tolist()
        for j in kept:
            b = boxes[j].tolist()
            shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
            if shared / (area(*a) + area(*b) - shared) > threshold:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
def test_nms(threshold, offset):
    from mmcv.ops import nms

    boxes, scores = boxes_and_scores()
    detections, kept = nms(boxes, scores, threshold, offset)
    assert kept.tolist() == greedy(boxes, scores, threshold, offset)
    assert torch.equal(detections, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_nms_of_no_boxes_and_with_bounds():
    from mmcv.ops import nms

    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1].tolist() == []
    boxes, scores = boxes_and_scores()
    expected = [i for i in greedy(boxes, scores, 0.5, 0) if scores[i] > 0.3][:5]
    assert nms(boxes, scores, 0.5, score_threshold=0.3, max_num=5)[1].tolist() == expected


def test_batched_nms_keeps_classes_apart():
    from mmcv.ops import batched_nms

    boxes, scores = boxes_and_scores()
    classes = torch.arange(len(boxes)) % 3
    _, kept = batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.3})
    expected: list[int] = []
    for c in range(3):
        mine = (classes == c).nonzero()[:, 0]
        expected += [int(mine[i]) for i in greedy(boxes[mine], scores[mine], 0.3, 0)]
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i])


def roi_align_reference(maps, rois, size, scale, ratio, aligned):
    """RoIAlign by its definition: the mean of bilinear samples on a regular grid in every bin."""
    height, width = maps.shape[2:]

    def sample(image, y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return image.new_zeros(image.shape[0])
        y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dx = y - top, x - left
        return (
            image[:, top, left] * (1 - dy) * (1 - dx)
            + image[:, top, right] * (1 - dy) * dx
            + image[:, bottom, left] * dy * (1 - dx)
            + image[:, bottom, right] * dy * dx
        )

    shift, rows = (0.5 if aligned else 0.0), []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (c * scale - shift for c in corners)
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        ny, nx = ratio or math.ceil(h / size), ratio or math.ceil(w / size)
        for i in range(size):
            for j in range(size):
                points = [
                    sample(maps[int(index)], y1 + (i + (a + 0.5) / ny) * h / size, x1 + (j + (b + 0.5) / nx) * w / size)
                    for a in range(ny)
                    for b in range(nx)
                ]
                rows.append(sum(points) / max(ny * nx, 1))
    return torch.stack(rows).view(len(rois), size, size, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("scale", "ratio", "aligned"), [(0.25, 0, True), (0.5, 2, True), (0.25, 2, False)])
def test_roi_align_and_its_gradient(scale, ratio, aligned, layout):
    from mmcv.ops import roi_align

    if layout == torch.channels_last and not served():
        pytest.skip("mmcv's own kernel takes its input for contiguous")
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 3, 9, 11, generator=generator)
    # One inside, one across the border, one smaller than a pixel of the map.
    rois = torch.tensor([[0, 3.0, 2.0, 20.0, 30.0], [1, -9.0, 10.0, 60.0, 33.0], [1, 8.0, 8.0, 9.0, 9.5]])
    upstream = torch.randn(3, 3, 4, 4, generator=generator)
    wanted = maps.double().requires_grad_()
    expected = roi_align_reference(wanted, rois.double(), 4, scale, ratio, aligned)
    expected.backward(upstream.double())
    given = maps.to(memory_format=layout).requires_grad_()
    out = roi_align(given, rois, 4, scale, ratio, "avg", aligned)
    out.backward(upstream)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    torch.testing.assert_close(given.grad.double(), wanted.grad, **TOLERANCE)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_focal_loss_and_its_gradient(reduction, weighted):
    from mmcv.ops import sigmoid_focal_loss

    if not served():
        pytest.skip("mmcv's own kernel runs on GPUs only")
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 5, generator=generator) * 4
    target = torch.arange(12) % (5 if weighted else 6)  # 5: background
    weight = torch.rand(5, generator=generator) if weighted else None
    wanted = logits.double().requires_grad_()
    p = torch.sigmoid(wanted)
    is_class = F.one_hot(target, 6)[:, :5].bool()
    expected = torch.where(is_class, -0.3 * (1 - p) ** 1.5 * p.log(), -0.7 * p**1.5 * (1 - p).log())
    if weighted:
        expected = expected * weight.double()[target][:, None]
    if reduction != "none":
        expected = expected.sum() / (12 if reduction == "mean" else 1)
    # The factor tells an upstream gradient that is left out.
    (3 * expected).sum().backward()
    given = logits.clone().requires_grad_()
    loss = sigmoid_focal_loss(given, target, 1.5, 0.3, weight, reduction)
    (3 * loss).sum().backward()
    torch.testing.assert_close(loss.double(), expected, **TOLERANCE)
    torch.testing.assert_close(given.grad.double(), wanted.grad, **TOLERANCE)


def test_focal_loss_of_a_class_without_weight():
    with pytest.raises(ValueError, match="weights were given for 2 classes, but a target is 2"):
        operators.sigmoid_focal_loss_forward(
            torch.zeros(1, 2), torch.tensor([2]), torch.ones(2), torch.zeros(1, 2), gamma=2.0, alpha=0.25
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_of_16_bit_maps(dtype):
    """Computed in float32 and rounded once."""
    maps = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    rois = torch.tensor([[0, 4.0, 4.0, 24.0, 20.0]]).to(dtype)
    call = {"aligned_height": 2, "aligned_width": 2, "spatial_scale": 0.25, "sampling_ratio": 2, "pool_mode": 1}
    out, empty = maps.new_zeros(1, 2, 2, 2), maps.new_zeros(0)
    operators.roi_align_forward(maps, rois, out, empty, empty, aligned=True, **call)
    exact = roi_align_reference(maps.double(), rois.double(), 2, 0.25, 2, True)
    torch.testing.assert_close(out, exact.float().to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_operators_that_are_not_served():
    """Importing them works, calling them says what to do."""
    from mmcv.ops import DeformConv2d, RoIAlign

    from vim.errors import UserError

    if not served():
        pytest.skip("mmcv was compiled: it has all operators")
    with pytest.raises(UserError, match=r"deform_conv_forward needs mmcv's compiled extension.*--compile"):
        DeformConv2d(3, 4, 3)(torch.zeros(1, 3, 8, 8), torch.zeros(1, 18, 6, 6))
    with pytest.raises(UserError, match="pool_mode='max'"):
        RoIAlign(2, pool_mode="max")(torch.zeros(1, 3, 8, 8), torch.zeros(1, 5))


def test_equals_compiled_mmcv():
    if served():
        pytest.skip("mmcv is not compiled (scripts/install_openmmlab.sh --compile): nothing to compare with")
    import mmcv._ext as compiled

    boxes, scores = boxes_and_scores()
    for offset in (0, 1):
        expected = compiled.nms(boxes, scores, iou_threshold=0.4, offset=offset)
        assert torch.equal(operators.nms(boxes, scores, iou_threshold=0.4, offset=offset), expected)
    maps = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(4))
    rois = torch.cat([torch.arange(60)[:, None] % 2, boxes], 1)
    upstream = torch.randn(60, 3, 7, 7, generator=torch.Generator().manual_seed(5))
    call = {"aligned_height": 7, "aligned_width": 7, "spatial_scale": 0.25, "pool_mode": 1}
    for ratio, aligned in ((0, True), (2, False)):
        results = []
        for functions in (compiled, operators):
            out, grad, empty = torch.zeros(60, 3, 7, 7), torch.zeros_like(maps), maps.new_zeros(0)
            kwargs = {**call, "sampling_ratio": ratio, "aligned": aligned}
            functions.roi_align_forward(maps, rois, out, empty, empty, **kwargs)
            functions.roi_align_backward(upstream, rois, empty, empty, grad, **kwargs)
            results.append((out, grad))
        for expected, own in zip(*results, strict=True):
            torch.testing.assert_close(own, expected, **TOLERANCE)
