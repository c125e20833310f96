"""Every registered model: size, names, and timm's contract on small images."""

import pytest
import timm
import torch

import vim
from vim.models.pos_embed import class_positions, split_class_tokens

# FACTS of the paper and the published files.
PARAMETERS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vim_base_patch16_224": 97_598_440,
}
NAMES = timm.list_models("vim_*")


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
    positions = class_positions(model.class_token, grid[0] * grid[1])
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), split_class_tokens(features, positions)[1])
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


def test_features_only():
    model = timm.create_model("vim_nano_patch4_32", features_only=True, out_indices=(1, 3, 5))
    maps = model(torch.randn(1, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 8, 8)] * 3
    assert model.feature_info.reduction() == [4, 4, 4]


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
