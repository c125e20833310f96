"""The paper's ablations as arguments: random position and rank at evaluation, and what cannot be combined.

Outputs and gradients of the trained kinds are checked against the published code in test_golden.py.
"""

import math

import pytest
import timm
import torch

import vim
from vim.models.layers import residual_norm
from vim.models.layout import TokenLayout, join_tokens

NANO = "vim_nano_patch4_32"


@pytest.fixture(scope="module")
def nano() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NANO, depth=2).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def from_tokens(model: torch.nn.Module, tokens: torch.Tensor, row: int) -> torch.Tensor:
    """Logits of a sequence (B, L, D), written out: blocks, final norm, the class token's row, head."""
    residual = None
    for layer in model.layers:
        tokens, residual = layer(tokens, residual)
    norm = model.norm_f
    return model.head(residual_norm(tokens, residual, norm.weight, norm.bias, norm.eps, True, True)[0][:, row])


@pytest.mark.parametrize("seed", range(4))
def test_random_position(nano, x, seed):
    """The class token goes to a random index, the position embedding's rows stay in order; its row is classified."""
    torch.manual_seed(seed)
    position = int(torch.randint(0, 65, (1,)))
    tokens = (
        join_tokens(nano.cls_token.expand(2, -1, -1), nano.patch_embed(x), TokenLayout((8, 8), 1, [position]))
        + nano.pos_embed
    )
    torch.manual_seed(seed)
    assert torch.equal(nano(x, if_random_cls_token_position=True), from_tokens(nano, tokens, position))


@pytest.mark.parametrize("seed", range(4))
def test_random_rank(nano, x, seed):
    """The whole sequence is shuffled, positions and class token with it; that token is still the one classified."""
    torch.manual_seed(seed)
    order = torch.randperm(65)
    tokens = (
        join_tokens(nano.cls_token.expand(2, -1, -1), nano.patch_embed(x), TokenLayout((8, 8), 1, [32]))
        + nano.pos_embed
    )
    torch.manual_seed(seed)
    expected = from_tokens(nano, tokens[:, order], order.tolist().index(32))
    assert torch.equal(nano(x, if_random_token_rank=True), expected)
    assert not torch.allclose(expected, nano(x), rtol=1e-3)


def test_random_rank_of_pooled_models(x):
    """Without a class token every token is pooled, and with two both are found again."""
    for options in ({"if_cls_token": False}, {"use_double_cls_token": True}):
        model = timm.create_model(NANO, depth=2, **options).eval()
        assert model(x, if_random_token_rank=True).shape == (2, 10)
        # Blocks that pass nothing on leave the pooled tokens as embedded: the order cannot matter.
        torch.nn.init.zeros_(model.layers[0].mixer.out_proj.weight)
        torch.nn.init.zeros_(model.layers[1].mixer.out_proj.weight)
        torch.testing.assert_close(model(x, if_random_token_rank=True), model(x))


@pytest.mark.parametrize(("options", "flag", "words"), [
    ({"if_cls_token": False}, "if_random_cls_token_position", "one class token, this one has 0"),
    ({"use_double_cls_token": True}, "if_random_cls_token_position", "one class token, this one has 2"),
    ({"if_rope": True}, "if_random_token_rank", "rotary"),
])  # fmt: skip
def test_probes_that_make_no_sense(options, flag, words, x):
    with pytest.raises(ValueError, match=words):
        timm.create_model(NANO, depth=2, **options)(x, **{flag: True})


@pytest.mark.parametrize(("options", "pool", "shape"), [
    ({}, "token", (2, 10)),
    ({"use_middle_cls_token": False}, "token", (2, 10)),
    ({"use_double_cls_token": True}, "token", (2, 10)),
    ({"if_cls_token": False}, "avg", (2, 10)),
    ({"if_cls_token": False, "final_pool_type": "max"}, "max", (2, 10)),
    ({"if_cls_token": False, "final_pool_type": "none"}, "last", (2, 10)),
    ({"if_cls_token": False, "final_pool_type": "all"}, "", (2, 64, 10)),
    ({"global_pool": "avg"}, "avg", (2, 10)),
])  # fmt: skip
def test_class_token_and_pooling(options, pool, shape, x):
    model = timm.create_model(NANO, depth=2, **options).eval()
    assert model.global_pool == pool
    tokens = model.forward_features(x)
    logits = model(x)
    assert logits.shape == shape
    prefix = {"none": [], "head": [0], "middle": [32], "double": [0, 65]}[model.class_token]
    patches = tokens[:, [i for i in range(tokens.shape[1]) if i not in prefix]]
    expected = {
        "token": lambda: model.head(tokens[:, prefix].mean(1)),
        "avg": lambda: model.head(patches.mean(1)),
        "max": lambda: model.head(tokens).amax(1),
        "last": lambda: model.head(tokens[:, -1]),
        "": lambda: model.head(tokens),
    }[pool]()
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"if_rope_residual": True}, "if_rope_residual needs if_rope"),
    ({"if_rope": True, "embed_dim": 18}, "multiple of 4, got 18"),
    ({"if_bidirectional": True, "depth": 3}, "depth must be even, got 3"),
    ({"if_bidirectional": True, "bimamba_type": "v2"}, "bimamba_type='none', got 'v2'"),
    ({"final_pool_type": "median"}, "final_pool_type is 'median'"),
    ({"global_pool": "token"}, "class token"),
    ({"global_pool": "median"}, "global_pool is 'median'"),
    ({"bimamba_type": "v4"}, "bimamba_type is 'v4'"),
    ({"img_size": 7}, r"img_size is 7.*patch size \(16, 16\)"),
    ({"img_size": (32, 32, 3)}, "img_size"),
    ({"img_size": 32.5}, r"img_size is 32\.5"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"stride": -1}, "stride is -1"),
    ({"depth": 0}, "depth is 0"),
    ({"embed_dim": 0}, "embed_dim is 0"),
    ({"num_classes": -1}, "num_classes is -1"),
    ({"in_chans": 0}, "in_chans is 0"),
    ({"drop_rate": 1.0}, r"drop_rate is 1\.0"),
    ({"drop_path_rate": -0.1}, r"drop_path_rate is -0\.1"),
    ({"drop_path_rate": math.nan}, "drop_path_rate is nan"),
])  # fmt: skip
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        vim.VisionMamba(**{"depth": 2, "embed_dim": 16, "img_size": 32, **arguments})


def test_unknown_argument():
    with pytest.raises(TypeError, match="depht"):
        vim.VisionMamba(depht=2)


@pytest.mark.parametrize(("call", "words"), [
    (lambda m: m(torch.zeros(1, 3, 48, 48)), r"\[48, 48\]: call set_input_size\(\(48, 48\)\)"),
    (lambda m: m(torch.zeros(1, 1, 32, 32)), r"\(batch, 3, height, width\), got \[1, 1, 32, 32\]"),
    (lambda m: m(torch.zeros(3, 32, 32)), "expected images"),
    (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=[2]), r"indices is \[2\].*-2 to 1"),
    (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=3), "indices is 3"),
    (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=0), "indices is 0"),
    (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=["a"]), "indices"),
    (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC"), "output_fmt is 'NHWC'"),
    (lambda m: m.prune_intermediate_layers([7]), r"indices is \[7\]"),
    (lambda m: m.set_input_size(3), "img_size is 3"),
    (lambda m: m.set_input_size((32, 0)), r"img_size is \(32, 0\)"),
    (lambda m: m.set_input_size("32"), "img_size is '32'"),
    (lambda m: m.set_input_size(patch_size=64), "patch size"),
    (lambda m: m.set_input_size(patch_size=(4,)), "patch_size"),
    (lambda m: m.reset_classifier(-1), "num_classes is -1"),
    (lambda m: m.reset_classifier(3, "mean"), "global_pool is 'mean', expected one of 'token'"),
])  # fmt: skip
def test_misuse_is_named_and_changes_nothing(call, words):
    model = timm.create_model(NANO, depth=2)
    before = {k: v.shape for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        call(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == before
    assert model.patch_embed.img_size == (32, 32)


def test_small_images_of_a_dynamic_model():
    model = timm.create_model(NANO, depth=2, dynamic_img_size=True)
    with pytest.raises(ValueError, match="smaller than the patch size"):
        model(torch.zeros(1, 3, 3, 32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drop_path_rate", "x"), ("drop_rate", True), ("norm_epsilon", float("nan")), ("norm_epsilon", "a"),
        ("init_layer_scale", float("nan")), ("scan_pool_scale", "x"), ("pt_hw_seq_len", 0), ("depth", True),
        ("ssm_cfg", [1]), ("ssm_cfg", {"d_state": 10**9}), ("ssm_cfg", {"expand": 10**6}), ("merge_blocks", 3),
        ("ssm_cfg", {"d_state": "16"}), ("dtype", torch.int8), ("dtype", "float32"),
    ],
)  # fmt: skip
def test_values_of_other_kinds_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^({name}|.* of {name}) is .*expected"):
        timm.create_model(NANO, **{name: value})


def test_out_indices_of_features_only():
    with pytest.raises(ValueError, match="indices"):
        timm.create_model(NANO, depth=2, features_only=True, out_indices=(0, 5))


def test_pairs_of_blocks_have_odd_features():
    model = timm.create_model(NANO, depth=4, bimamba_type="none", if_bidirectional=True).eval()
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="odd"):
        model.forward_intermediates(x, indices=[0])
    with pytest.raises(ValueError, match="pairs"):
        model.forward_intermediates(x, indices=3)
    maps = model.forward_intermediates(x, indices=2, intermediates_only=True)
    one, other = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert torch.equal(maps[0], one)
    assert torch.equal(maps[1], other)
