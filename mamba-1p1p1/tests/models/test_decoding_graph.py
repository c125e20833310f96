"""Decoding by replaying a graph, where a recorder of torch's operators stands in for CUDA's.

Like a CUDA graph it repeats what ran on the very memory that it ran on, and knows nothing of Python.
"""

import contextlib
from typing import ClassVar

import pytest
import torch
from mamba_ssm_vim.models.config_mamba import MambaConfig
from mamba_ssm_vim.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm_vim.utils import generation
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    made: ClassVar[list["Graph"]] = []

    def __init__(self):
        self.calls, self.replays = [], 0
        Graph.made.append(self)

    def replay(self):
        self.replays += 1
        for function, arguments, keywords, outputs in self.calls:
            for new, old in zip(tree_leaves(function(*arguments, **keywords)), tree_leaves(outputs), strict=True):
                if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        self.graph.calls.append((function, arguments, keywords or {}, outputs))
        return outputs


class Stream:
    def wait_stream(self, other):
        """Everything has run already."""

    def synchronize(self):
        """The same."""


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    Graph.made = []
    monkeypatch.setattr(generation, "can_capture", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: Recorder(graph))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: (0, 1))
    return Graph.made


@pytest.fixture
def model() -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=24, n_layer=2, vocab_size=61)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)
    return model


def prompts(batch: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 61, (batch, 5), generator=torch.Generator().manual_seed(seed))


def test_replays_give_what_the_modules_give(graphs, model):
    for batch, seed in ((2, 0), (2, 1), (1, 2), (2, 3)):
        ids = prompts(batch, seed)
        expected = generation.decode(ids, model, 12)
        found = generation.decode(ids, model, 12, cg=True)
        assert torch.equal(found.sequences, expected.sequences)
        # float32 sums in another order, over seven steps.
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=5e-5, atol=5e-5)
    # One graph per batch size, used again; the first new token of each call comes from the prompt.
    assert [g.replays for g in graphs] == [3 * 6, 6]


def test_limits_grow_by_making_graphs_anew(graphs, model):
    for length in (8, 8, 20, 9):
        generation.decode(prompts(1, 0), model, length, cg=True)
    assert len(graphs) == 2
    cache = model._decoding_cache
    assert (cache.max_batch_size, cache.max_seqlen, cache.dtype) == (1, 20, torch.float32)
    model.bfloat16()
    found = generation.decode(prompts(1, 0), model, 8, cg=True)
    assert len(graphs) == 3
    assert found.scores[1].dtype is torch.bfloat16


def test_steps_of_several_tokens(graphs, model):
    ids = prompts(2, 4)
    cache = generation.update_graph_cache(model, None, 2, 5, 12, decoding_seqlens=(1, 3))
    with torch.inference_mode():
        params = cache.callables[2, 3][1]
        params.reset(12, 2)
        model(ids[:, :2], inference_params=params)
        found = cache.run(ids[:, 2:], None, 2)
        expected = model(ids).logits[:, 2:]
    torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)
