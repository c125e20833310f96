"""Steps replayed from a graph: the plumbing on a CPU, where a stand-in repeats what was captured, and the refusals."""

import pytest
import torch
from torch import nn

from vim.engine import graphs
from vim.engine.arguments import parse_args
from vim.engine.distributed import DistributedContext
from vim.engine.graphs import GraphedBackward

GPU = DistributedContext(torch.device("cuda", 0))


class Recorder:
    """In place of a GPU's capture: runs the function again, and writes its results to the memory of the first time."""

    def __init__(self, parameters, holder):
        self.parameters, self.holder, self.replays = parameters, holder, 0

    def __call__(self, run):
        state = torch.get_rng_state()
        run()
        torch.set_rng_state(state)  # a capture runs nothing, and draws nothing
        graphed = self.holder[0]
        loss, grads = graphed._loss, [p.grad for p in self.parameters]

        def replay():
            self.replays += 1
            before = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
            run()
            loss.copy_(graphed._loss)
            graphed._loss = loss
            for p, static, kept in zip(self.parameters, grads, before, strict=True):
                if static is not None:
                    static.copy_(p.grad)
                p.grad = kept

        return replay


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return net


def steps(graphed, parts, sizes=(6,) * 7):
    """Gradients after each update of some batches, with the same seeds in every run."""
    net, holder = model(), []
    parameters = list(net.parameters())

    def eager(images, targets, parts):
        loss = nn.functional.cross_entropy(net(images), targets) / parts
        loss.backward()
        return loss.detach()

    backward, recorder = eager, Recorder(parameters, holder)
    if graphed:
        backward = GraphedBackward(eager, parameters, parts=parts, capture=recorder)
        holder.append(backward)
    found, draw = [], torch.Generator().manual_seed(1)
    for k, size in enumerate(sizes):
        for p in parameters:
            p.grad = None
        share = min(parts, len(sizes) - k)  # the last update may have fewer batches
        total = torch.zeros(())
        for part in range(share):
            images = torch.randn(size, 4, generator=draw)
            targets = torch.randint(3, (size,), generator=draw)
            torch.manual_seed(100 * k + part)
            total += backward(images, targets, share)
        found.append([total, *(None if p.grad is None else p.grad.clone() for p in parameters)])
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p -= 0.1 * p.grad
    assert found[0][1] is None
    assert found[0][-1] is not None
    return found, recorder.replays


@pytest.mark.parametrize("parts", [1, 3])
def test_replays_give_the_gradients_of_eager_steps(parts):
    exact, _ = steps(False, parts)
    found, replays = steps(True, parts)
    for step, expected in zip(found, exact, strict=True):
        for actual, right in zip(step, expected, strict=True):
            assert (actual is None) == (right is None)
            assert actual is None or torch.equal(actual, right)
    # Of 7 updates in one part, 3 are eager; of 7 in three parts (the last two have fewer), 15 batches but for 3.
    assert replays == {1: 4, 3: 12}[parts]


def test_batches_of_another_size_are_eager():
    sizes = (6,) * 5 + (2, 6)
    exact, _ = steps(False, 1, sizes)
    found, replays = steps(True, 1, sizes)
    assert replays == 3
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(found, exact, strict=True))


def test_a_failed_capture_is_said_once(caplog):
    calls = []

    def capture(run):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    weight = nn.Parameter(torch.ones(2))
    graphed = GraphedBackward(lambda *a: calls.append(a) or torch.zeros(()), [weight], capture=capture)
    for _ in range(6):
        graphed(torch.ones(2), torch.ones(2), 1)
    assert len(calls) == 6
    assert [r.message for r in caplog.records] == ["steps are not replayed from a CUDA graph: operation not permitted"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), None),
        (("--compile",), "--compile"),
        (("--grad-checkpointing",), "--grad-checkpointing"),
        (("--pretrain", "masked"), "--pretrain"),
        (("--if_random_cls_token_position",), "--if_random_cls_token_position"),
        (("--if_random_token_rank",), "--if_random_token_rank"),
    ],
)
def test_why_not(argv, words):
    reason = graphs.why_not(parse_args([*argv]), GPU)
    assert reason is None if words is None else words in reason


def test_no_gpu_and_several_processes():
    assert "no GPU" in graphs.why_not(parse_args([]), DistributedContext(torch.device("cpu")))
    assert "several processes" in graphs.why_not(
        parse_args([]), DistributedContext(torch.device("cuda", 0), world_size=2)
    )
