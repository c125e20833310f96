"""The training loss against its formulas, written out here by sums over classes."""

import math

import pytest
import timm
import torch
from torch import nn

from vim.engine.arguments import parse_args
from vim.engine.build import build_criterion
from vim.engine.distributed import DistributedContext
from vim.engine.losses import Criterion
from vim.errors import UserError

CONTEXT = DistributedContext(torch.device("cpu"))
PLAIN = ("--mixup", "0", "--cutmix", "0", "--batch-size", "4", "--model", "vim_nano_patch4_32", "--input-size", "32")
CLASSES = 5
LABELS = torch.tensor([0, 3, 4, 3])


def parsed(*argv):
    return parse_args([*PLAIN, *map(str, argv)])


@pytest.fixture
def logits():
    return torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def value(logits, *argv, teacher=None, labels=LABELS):
    """The criterion of a model that answers with these logits to any images."""
    criterion = Criterion(parsed(*argv), CLASSES, teacher)
    return criterion(lambda images: logits, torch.zeros(len(labels), 3, 2, 2), labels).item()


def log_softmax(logits):
    return logits - logits.exp().sum(1, keepdim=True).log()


def binary(logits, targets):
    """Mean over samples and classes of the binary cross-entropy."""
    p = 1 / (1 + (-logits).exp())
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


def one_hot(labels=LABELS):
    return torch.eye(CLASSES, dtype=torch.float64)[labels]


class Fixed(nn.Module):
    """A teacher that answers with these logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits


def test_labels_and_smoothing(logits):
    plain = -(one_hot() * log_softmax(logits)).sum(1).mean().item()
    assert value(logits, "--smoothing", 0) == pytest.approx(plain)
    smooth = one_hot() * 0.8 + 0.2 / CLASSES
    expected = -(smooth * log_softmax(logits)).sum(1).mean().item()
    assert value(logits, "--smoothing", 0.2) == pytest.approx(expected)


def test_mixed_labels(logits):
    """Mixup's targets: each sample's and its partner's labels in the drawn ratio, smoothed."""
    criterion = Criterion(parsed("--mixup", 1.0, "--smoothing", 0.1), CLASSES)
    seen = []
    mixup = criterion.mixup
    criterion.mixup = lambda images, labels: seen.append(mixup(images, labels)) or seen[0]
    loss = criterion(lambda images: logits, torch.rand(4, 3, 8, 8), LABELS)
    targets = seen[0][1].double()
    assert torch.allclose(targets.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-6)
    assert loss.item() == pytest.approx(-(targets * log_softmax(logits)).sum(1).mean().item(), rel=1e-6)


def test_binary_cross_entropy(logits):
    assert value(logits, "--bce-loss", "--smoothing", 0) == pytest.approx(binary(logits, one_hot()).item())
    with_mixing = Criterion(parsed("--bce-loss", "--mixup", 0.5, "--smoothing", 0), CLASSES)
    with_mixing.mixup = lambda images, labels: (images, 0.3 * one_hot() + 0.7 * one_hot(labels.flip(0)))
    # Whatever is in the mixture counts as wholly present.
    present = ((one_hot() + one_hot(LABELS.flip(0))) > 0).double()
    loss = with_mixing(lambda images: logits, torch.zeros(4, 3, 2, 2), LABELS)
    assert loss.item() == pytest.approx(binary(logits, present).item())


def test_cosub(logits):
    """Two sub-models: one pass over the batch twice; labels and each other's decision, gradients not through those."""
    second = logits.flip(0).clone()
    both = torch.cat((logits, second)).requires_grad_()
    criterion = Criterion(parsed("--cosub", "--drop-path", 0.1, "--smoothing", 0), CLASSES)
    seen = []
    loss = criterion(lambda images: seen.append(images.shape) or both, torch.zeros(4, 3, 2, 2), LABELS)
    assert seen == [(8, 3, 2, 2)]
    p, q = (1 / (1 + (-x).exp()) for x in (logits, second))
    expected = binary(logits, one_hot()) + binary(second, one_hot()) + binary(logits, q) + binary(second, p)
    assert loss.item() == pytest.approx(0.25 * expected.item())
    loss.backward()
    # The gradient of a mean binary cross-entropy is (p - target) / (samples x classes), the target held fixed.
    gradient = 0.25 * ((p - one_hot()) + (p - q)) / (4 * CLASSES)
    torch.testing.assert_close(both.grad[:4], gradient)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation(logits, tau):
    teacher = Fixed(logits.roll(1, 1).clone())
    base = -(one_hot() * log_softmax(logits)).sum(1).mean()
    t, s = log_softmax(teacher.logits.detach() / tau), log_softmax(logits / tau)
    divergence = (t.exp() * (t - s)).sum(1).mean() * tau**2
    flags = ("--distillation-type", "soft", "--distillation-alpha", 0.3, "--distillation-tau", tau, "--smoothing", 0)
    assert value(logits, *flags, teacher=teacher) == pytest.approx((0.7 * base + 0.3 * divergence).item())
    assert not teacher.logits.requires_grad
    assert not teacher.training


def test_hard_distillation(logits):
    teacher = Fixed(logits.roll(1, 1).clone())
    base = -(one_hot() * log_softmax(logits)).sum(1).mean()
    decided = one_hot(teacher.logits.argmax(1))
    term = -(decided * log_softmax(logits)).sum(1).mean()
    flags = ("--distillation-type", "hard", "--distillation-alpha", 0.4, "--smoothing", 0)
    assert value(logits, *flags, teacher=teacher) == pytest.approx((0.6 * base + 0.4 * term).item())


def test_teacher_is_any_timm_model(tmp_path):
    """Built by name with the run's classes, its weights from the file; it needs both a name that exists and a file."""
    teacher = timm.create_model("resnet10t", num_classes=CLASSES)
    path = tmp_path / "teacher.pth"
    torch.save({"state_dict": teacher.state_dict()}, path)
    flags = ("--distillation-type", "soft", "--teacher-model", "resnet10t", "--input-size", 32)
    criterion = build_criterion(parsed(*flags, "--teacher-path", path), CONTEXT, CLASSES)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(criterion.teacher(images), teacher.eval()(images))
    assert build_criterion(parsed("--teacher-path", path), CONTEXT, CLASSES).teacher is None
    with pytest.raises(UserError, match="needs --teacher-path"):
        build_criterion(parsed(*flags), CONTEXT, CLASSES)
    with pytest.raises(UserError, match="there is no model 'regnety_16'"):
        build_criterion(parsed(*flags, "--teacher-model", "regnety_16", "--teacher-path", path), CONTEXT, CLASSES)
    with pytest.raises(UserError, match="there is no checkpoint"):
        build_criterion(parsed(*flags, "--teacher-path", tmp_path / "absent.pth"), CONTEXT, CLASSES)


def test_nan_to_num(logits):
    broken = logits.clone()
    broken[0, 1], broken[1, 2] = float("nan"), float("inf")
    assert not math.isfinite(value(broken, "--smoothing", 0))
    assert math.isfinite(value(broken, "--smoothing", 0, "--if_nan2num"))
    assert not math.isfinite(value(broken, "--smoothing", 0, "--if_nan2num", "--no_nan2num"))


def test_what_cannot_be_combined():
    with pytest.raises(UserError, match="must be even"):
        Criterion(parsed("--mixup", 0.8, "--batch-size", 3), CLASSES)
    with pytest.raises(UserError, match="pass one of them"):
        Criterion(parsed("--cosub"), CLASSES, Fixed(torch.zeros(1)))
    with pytest.raises(UserError, match="must be above 0"):
        Criterion(parsed("--cosub", "--drop-path", 0), CLASSES)


@pytest.mark.parametrize("flag", ["--bce-loss", "--cosub"])
def test_binary_targets_of_a_mixture_are_its_classes_alone(flag):
    """With the default smoothing too, at most the two mixed classes of an image are present."""
    criterion = Criterion(parsed(flag, "--mixup", 0.8), CLASSES)
    _, targets = criterion.mixup(torch.rand(4, 3, 8, 8), LABELS)
    present = targets.gt(0).sum(1)
    assert present.max() <= 2
    assert present.min() >= 1
