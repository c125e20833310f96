"""Merging tokens at inference: the rule against a loop written out, order and places, and where nothing is lost."""

import io
import itertools
import warnings

import pytest
import timm
import torch

from vim.models.layout import TokenLayout, split_tokens
from vim.models.merging import merge_tokens


def written_out(tokens, residual, sizes, count):
    """Bipartite soft matching of one sample (n, D), token by token."""
    stream = torch.nn.functional.normalize(tokens + residual, dim=-1)
    even, odd = range(0, len(stream), 2), range(1, len(stream), 2)
    best = {i: max(odd, key=lambda j: float(stream[i] @ stream[j])) for i in even}
    chosen = sorted(even, key=lambda i: -float(stream[i] @ stream[best[i]]))[:count]
    groups = {j: [j] + [i for i in chosen if best[i] == j] for j in odd}
    rows = []
    for k in range(len(stream)):
        if k not in chosen:
            members = groups.get(k, [k])
            weights = sizes[members]
            mean = [(values[members] * weights).sum(0) / weights.sum() for values in (tokens, residual)]
            rows.append((*mean, weights.sum(0)))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("positions", [[], [0], [5], [3, 7]])
def test_rule(positions: list[int]) -> None:
    torch.manual_seed(0)
    length, ratio = 12 + len(positions), 0.4
    tokens, residual = torch.randn(3, length, 8), torch.randn(3, length, 8)
    sizes = torch.randint(1, 4, (3, length, 1)).float()
    merged = merge_tokens(tokens, residual, sizes, TokenLayout((3, 4), 1, positions), ratio)
    edges = [-1, *positions, length]
    for sample in range(3):
        expected = [[], [], []]
        for start, end in itertools.pairwise(edges):
            part = slice(start + 1, end)
            values = (tokens[sample, part], residual[sample, part], sizes[sample, part])
            count = int((end - start - 1) * ratio)
            for column, piece in zip(expected, written_out(*values, count) if count else values, strict=True):
                column.append(piece)
            if end < length:
                for column, whole in zip(expected, (tokens, residual, sizes), strict=True):
                    column.append(whole[sample, end : end + 1])
        for found, column in zip(merged, expected, strict=False):
            torch.testing.assert_close(found[sample], torch.cat(column))
    assert merged[2].sum() == sizes.sum(), "every patch is counted once"
    special, _ = split_tokens(merged[0], merged[3])
    assert torch.equal(special, tokens[:, positions])


def test_equal_pairs_merge_without_loss() -> None:
    """Where every even token equals its neighbour, half of them go and nothing else changes."""
    torch.manual_seed(0)
    pairs = torch.randn(2, 5, 16).repeat_interleave(2, dim=1)
    tokens, _, sizes, layout = merge_tokens(
        pairs, torch.zeros_like(pairs), torch.ones(2, 10, 1), TokenLayout((2, 5), 1, []), 0.5
    )
    torch.testing.assert_close(tokens, pairs[:, 1::2])
    assert torch.equal(sizes, torch.full((2, 5, 1), 2.0))
    assert layout.grid == (1, 5)


@pytest.mark.parametrize("name", ["vim_nano_patch4_32", "mambar_tiny_patch16_224", "videomamba_tiny_patch16_f8_224"])
def test_models(name: str) -> None:
    """Shorter sequences at inference, none in training; TorchScript agrees; there are no feature maps."""
    torch.manual_seed(0)
    sizes = {"depth": 4, "embed_dim": 32, "num_classes": 5, "drop_path_rate": 0.0}
    if "nano" not in name:
        sizes["img_size"] = 64 if "f8" in name else 128
    plain = timm.create_model(name, **sizes).eval()
    model = timm.create_model(name, **sizes, merge_ratio=0.25).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, *model.input_shape)
    whole, merged = plain.forward_features(x), model.forward_features(x)
    assert merged.shape[1] < 0.8 * whole.shape[1]
    assert not torch.equal(model(x), plain(x))
    torch.testing.assert_close(model.train()(x), plain.train()(x))
    model.eval()
    if name.startswith("mambar"):
        with pytest.raises(ValueError, match="merged registers"):
            model.forward_head(merged)
    else:
        torch.testing.assert_close(model.forward_head(merged), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces TorchScript's end on every call
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no grid"):
        model.forward_intermediates(x)
