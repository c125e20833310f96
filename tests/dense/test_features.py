"""Features and pyramids of dense models in plain PyTorch."""

import pytest
import timm
import torch

from vim.dense.features import VimFeatures, layer_decay_groups
from vim.dense.pyramid import RescaledMaps, SimpleFeaturePyramid

NANO = {"arch": "vim_nano_patch4_32", "img_size": 32, "out_indices": (1, 3)}


def test_features_are_the_classifiers_own_maps():
    torch.manual_seed(0)
    source = timm.create_model(NANO["arch"]).eval()
    features = VimFeatures(**NANO, class_token="keep").eval()
    features.load_classifier(source.state_dict())
    x = torch.randn(2, 3, 32, 32)
    expected = source.forward_intermediates(x, indices=[1, 3], norm=True, intermediates_only=True)
    for own, other in zip(features(x), expected, strict=True):
        torch.testing.assert_close(own, other)
    assert features(torch.randn(1, 3, 26, 50))[0].shape == (1, 64, 7, 13)


def test_layer_decay_of_a_dense_model():
    model = torch.nn.ModuleDict({"features": VimFeatures(**NANO), "head": torch.nn.Conv2d(64, 3, 1)})
    vim = model["features"].vim
    groups = layer_decay_groups(model.named_parameters(), vim, "features.vim.", 0.5, 0.1)
    of = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    assert set(of) == {name for name, _ in model.named_parameters()}
    assert (of["head.weight"], of["head.bias"]) == ((1, 0.1), (1, 0))
    assert of["features.vim.layers.3.mixer.in_proj.weight"] == (0.5, 0.1)
    assert of["features.vim.pos_embed"] == (0.5**5, 0)
    with pytest.raises(ValueError, match=r"layer_decay_rate is 1\.5"):
        layer_decay_groups([], vim, "", 1.5, 0)
    with pytest.raises(ValueError, match="needs a Vim backbone, got Linear"):
        layer_decay_groups([], torch.nn.Linear(2, 2), "", 1, 0)


def test_pyramid_scales():
    outs = SimpleFeaturePyramid(32, out_channels=16)([torch.randn(1, 32, 8, 12)])
    assert [o.shape[1:] for o in outs] == [(16, 32, 48), (16, 16, 24), (16, 8, 12), (16, 4, 6), (16, 2, 3)]
    # The last is every second pixel of the one before.
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])
    assert all(o.is_contiguous() for o in outs)


def test_rescaled_maps():
    maps = [torch.randn(1, 8, 4, 6) for _ in range(4)]
    outs = RescaledMaps(8)(maps)
    assert [o.shape[1:] for o in outs] == [(8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3)]
    assert torch.equal(outs[2], maps[2])
    assert torch.equal(outs[3], torch.nn.functional.max_pool2d(maps[3], 2))


@pytest.mark.parametrize(("kwargs", "message"), [({"scales": (3,)}, "scale 3"), ({"num_outs": 2}, "fewer than the 4")])
def test_pyramid_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(32, **kwargs)
