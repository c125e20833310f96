"""Every registered model: size, names, and timm's contract on small images."""

import copy
import importlib

import pytest
import timm
import torch

import vim
from vim.models.layout import split_tokens
from vim.models.patch_embed import PatchEmbed

# FACTS of the paper and the published files.
PARAMETERS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vim_base_patch16_224": 97_598_440,
}
NAMES = timm.list_models("vim_*", exclude_filters="*layernorm*")  # which test_zoo.py takes


@pytest.fixture(scope="module")
def nano():
    return timm.create_model("vim_nano_patch4_32").eval()


def test_all_names_are_registered():
    assert len([n for n in NAMES if "nano" not in n]) == 10
    for short in PARAMETERS:
        assert any(n.startswith(short + "_bimambav2") for n in NAMES)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    """The interface that timm's own tests ask of every model, on a shallow copy of each."""
    size = 32 if "nano" in name else 64
    model = timm.create_model(name, depth=4, img_size=size, num_classes=7, drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, size, size)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert timm.get_pretrained_cfg(name).first_conv == "patch_embed.proj"
    assert timm.get_pretrained_cfg(name).classifier == "head"
    grid = model.patch_embed.grid_size
    final, maps = model.forward_intermediates(x, indices=[1, 3], norm=True)
    assert [m.shape for m in maps] == [(2, model.embed_dim, *grid)] * 2
    torch.testing.assert_close(final, features)
    layout = model.token_layout
    assert layout.grid == grid
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), split_tokens(features, layout)[1])
    tokens = model.forward_intermediates(
        x, 1, output_fmt="NLC", stop_early=True, intermediates_only=True, return_prefix_tokens=True
    )
    assert tokens[0][0].shape == (2, grid[0] * grid[1], model.embed_dim)
    assert tokens[0][1].shape == (2, 1, model.embed_dim)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.reset_classifier(0)
    assert model.eval()(x).shape == (2, model.num_features)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.layers) == 2


@pytest.mark.parametrize("name", NAMES)
def test_pruned_models_keep_their_taps(name):
    """Pruning and stopping early change no tap, leave no parameter unused, and without pruning nothing changes."""
    torch.manual_seed(0)
    size = 16 if "nano" in name else 64
    model = timm.create_model(name, depth=3, img_size=size, drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        whole = copy.deepcopy(model)
        assert whole.prune_intermediate_layers([2], prune_head=False) == [2]
        assert torch.equal(whole(x), model(x))
    for i in range(3):
        with torch.no_grad():
            early = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
            assert torch.equal(early[0], taps[i])
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([i], prune_norm=True)
        assert len(pruned.layers) == i + 1
        with torch.no_grad():
            final, maps = pruned.forward_intermediates(x, indices=take)
        assert torch.equal(maps[0], taps[i])
        # Without a norm the features end at the tap.
        patches = split_tokens(final, model.token_layout)[1]
        assert torch.equal(patches.transpose(1, 2).unflatten(2, model.patch_embed.grid_size), taps[i])
        pruned.train().forward_features(x).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())


def test_features_only():
    model = timm.create_model("vim_nano_patch4_32", features_only=True, out_indices=(1, 3, 5))
    maps = model(torch.randn(1, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 8, 8)] * 3
    assert model.feature_info.reduction() == [4, 4, 4]
    assert model(torch.randn(1, 3, 24, 48))[0].shape == (1, 64, 6, 12), "any size"


SMALL = {"depth": 4, "embed_dim": 16, "features_only": True}


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vim_nano_patch4_32", {}),
        ("vim_nano_patch4_32", {"if_bidirectional": True, "bimamba_type": "none", "out_indices": (1, 3)}),
        ("vim_nano_patch4_32", {"bimamba_type": "none", "if_bidirectional": True, "depth": 2}),
        ("vim_nano_patch4_32", {"if_rope": True, "if_rope_residual": True, "depth": 1}),
        ("vim_nano_patch4_32", {"use_double_cls_token": True, "out_indices": [-1]}),
        ("mambar_tiny_patch16_224", {"img_size": 64}),
        ("fastvim_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("arm_base_patch16_224", {"img_size": 64, "mlp_dim": 32}),
        ("videomamba_tiny_patch16_f8_224", {"img_size": 32, "num_frames": 2}),
    ],
)
def test_feature_maps_of_hooks_and_graphs(name, kwargs, feature_cls):
    """What timm's other ways of taking features give is what its getter gives: maps, of every kind of model."""
    models = []
    for cls in ({}, {"feature_cls": feature_cls}):
        torch.manual_seed(0)
        models.append(timm.create_model(name, **{**SMALL, **kwargs}, **cls).eval())
    getter, other = models
    x = torch.randn(2, *getter.model.input_shape)
    maps = other(x)
    assert other.feature_info.reduction() == getter.feature_info.reduction()
    assert len(maps) == len(other.feature_info.channels())
    for one, another in zip(getter(x), maps, strict=True):
        assert torch.equal(one, another)
    sum(m.sum() for m in maps).backward()


def test_features_that_cannot_be_taken():
    for kwargs, words in (
        ({"feature_cls": "list"}, "feature_cls is 'list', expected 'getter'"),
        ({"feature_cls": "hook", "out_indices": (0, 7)}, "indices is"),
        ({"feature_cls": "fx", "out_indices": 9}, "indices is 9"),
        ({"feature_cls": "fx", "merge_ratio": 0.2}, "merged tokens have no grid"),
        ({"feature_cls": "hook", "if_bidirectional": True, "bimamba_type": "none", "out_indices": [0]}, "must be odd"),
    ):
        with pytest.raises(ValueError, match=words):
            timm.create_model("vim_nano_patch4_32", **SMALL, **kwargs)


def test_in_chans_and_img_size():
    model = timm.create_model("vim_nano_patch4_32", in_chans=1, img_size=(28, 40), num_classes=2)
    assert model(torch.randn(1, 1, 28, 40)).shape == (1, 2)


def test_dynamic_size_agrees_with_set_input_size(nano):
    x = torch.randn(1, 3, 24, 48)
    dynamic = timm.create_model("vim_nano_patch4_32", dynamic_img_size=True).eval()
    dynamic.load_state_dict(nano.state_dict())
    resized = timm.create_model("vim_nano_patch4_32").eval()
    resized.load_state_dict(nano.state_dict())
    resized.set_input_size((24, 48))
    torch.testing.assert_close(dynamic(x), resized(x))


def test_rotary_model_at_another_grid():
    options = {
        "img_size": 32, "patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 32, "if_rope": True,
        "if_rope_residual": True, "rms_norm": True, "bimamba_type": "v2", "final_pool_type": "mean", "num_classes": 3,
    }  # fmt: skip
    model = vim.VisionMamba(**options, dynamic_img_size=True).eval()
    x = torch.randn(1, 3, 16, 40)
    expected = model(x)
    model.set_input_size((16, 40))
    torch.testing.assert_close(model(x), expected)


OPTIONS = {
    "v2": {},
    "v1, layer scale": {"bimamba_type": "v1", "init_layer_scale": 0.1},
    "one direction, LayerNorm, rotary": {"bimamba_type": "none", "rms_norm": False, "if_rope": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_init_weights_after_to_empty(options):
    """A model made on "meta" gets storage, then values: of the distribution that it would have been built with."""
    torch.manual_seed(0)
    built = timm.create_model("vim_nano_patch4_32", depth=2, **options)
    model = timm.create_model("vim_nano_patch4_32", depth=2, device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    expected = built.state_dict()
    for name, value in model.state_dict().items():
        if value.std() == 0 or name.endswith("A_log") or name.endswith("A_b_log") or name.startswith("rope"):
            assert torch.equal(value, expected[name]), name
        else:
            # Standard deviations of at least 64 samples: within half of each other, however they fall.
            assert 0.5 < value.std() / expected[name].std() < 2, name
            assert abs(value.mean() - expected[name].mean()) < expected[name].std(), name
    assert torch.isfinite(model.eval()(torch.randn(1, 3, 32, 32))).all()


def test_frozen_stays_frozen():
    """Replacing the head or the size makes nothing trainable, and keeps device, type and mode."""
    model = timm.create_model("vim_nano_patch4_32", depth=2).requires_grad_(False).to(torch.float64).eval()
    model.reset_classifier(0)
    model.set_input_size((24, 48), patch_size=8)
    assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    assert model.feature_info[0]["reduction"] == 8


def test_timm_finds_the_filter_beside_the_class(nano):
    """A checkpoint without its head goes through timm's generic reload."""
    filter_fn = importlib.import_module(type(nano).__module__).checkpoint_filter_fn
    source = timm.create_model("vim_nano_patch4_32", num_classes=0, img_size=(24, 48)).eval()
    again = timm.create_model("vim_nano_patch4_32", num_classes=0, img_size=(24, 48)).eval()
    again.load_state_dict(filter_fn(dict(sorted(source.state_dict().items())), again))
    x = torch.randn(1, 3, 24, 48)
    assert torch.equal(again(x), source(x))


def test_gradient_checkpointing_changes_nothing(nano):
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enabled in (False, True):
        nano.set_grad_checkpointing(enabled)
        nano.zero_grad()
        nano(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in nano.parameters()])
    nano.set_grad_checkpointing(False)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (37, 50)])
@pytest.mark.parametrize("column_major", [False, True])
def test_patches_as_a_matrix_product(size, column_major):
    """What GPUs compute in place of the convolution; pixels beyond the last whole patch are left out by both."""
    embed = PatchEmbed(size, 16, 16, 3, 24, column_major=column_major, dtype=torch.float64)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(embed._multiply(images), embed(images), rtol=0, atol=1e-12)


def test_patches_are_convolved_where_something_is_attached():
    embed = PatchEmbed(32, 16, 16, 3, 24)
    assert embed._is_matrix_product()
    assert not PatchEmbed(32, 16, 8, 3, 24)._is_matrix_product()
    embed.proj.register_forward_hook(lambda *_: None)
    assert not embed._is_matrix_product()
