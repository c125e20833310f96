"""The backbone adapter: maps of every size, weights of classifiers, layer decay, the pyramid in mmdet."""

import pytest
import timm
import torch

NANO = {"arch": "vim_nano_patch4_32", "img_size": 32, "out_indices": (1, 5)}


def build(**kwargs):
    from vim.dense.backbone import VimBackbone

    torch.manual_seed(1)
    return VimBackbone(**{**NANO, **kwargs})


def classifier(**kwargs):
    torch.manual_seed(2)
    return timm.create_model(NANO["arch"], **kwargs)


@pytest.mark.parametrize(
    ("size", "grid"), [((32, 32), (8, 8)), ((24, 52), (6, 13)), ((33, 30), (9, 8)), ((2, 40), (1, 10))]
)
@pytest.mark.parametrize("class_token", ["remove", "keep"])
def test_maps_cover_images_of_any_size(size, grid, class_token):
    maps = build(class_token=class_token)(torch.randn(2, 3, *size))
    assert [m.shape for m in maps] == [(2, 64, *grid)] * 2


def test_a_kept_class_token_gives_the_classifiers_own_maps():
    source = classifier().eval()
    backbone = build(class_token="keep").eval()
    backbone.load_classifier(source.state_dict())
    x = torch.randn(2, 3, 32, 32)
    expected = source.forward_intermediates(x, indices=[1, 5], norm=True, intermediates_only=True)
    for own, other in zip(backbone(x), expected, strict=True):
        torch.testing.assert_close(own, other)


def test_a_removed_class_token_takes_its_position_row_along():
    state = classifier().state_dict()
    backbone = build(class_token="remove")
    backbone.load_classifier(state)
    middle = 32
    expected = torch.cat([state["pos_embed"][:, :middle], state["pos_embed"][:, middle + 1 :]], dim=1)
    assert torch.equal(backbone.vim.pos_embed, expected)
    assert "cls_token" not in backbone.vim.state_dict()


@pytest.mark.parametrize("class_token", ["remove", "keep"])
def test_positions_are_resampled_to_the_training_grid(class_token):
    """A position embedding that grows evenly with the row does so on the finer grid as well."""
    state = classifier().state_dict()
    rows = torch.arange(8.0).repeat_interleave(8)[None, :, None].expand(1, 64, 64)
    state["pos_embed"] = torch.cat([rows[:, :32], torch.full((1, 1, 64), 99.0), rows[:, 32:]], dim=1)
    backbone = build(class_token=class_token, img_size=(64, 48))
    backbone.load_classifier(state)
    own = backbone.vim.pos_embed.detach()
    if class_token == "keep":
        middle = 16 * 12 // 2
        assert (own[:, middle] == 99).all()
        own = torch.cat([own[:, :middle], own[:, middle + 1 :]], dim=1)
    table = own.reshape(16, 12, 64)
    # Away from the border a bicubic kernel reproduces a straight line: row r of 16 stands at (r + 0.5) / 2 - 0.5 of 8.
    expected = ((torch.arange(16.0) + 0.5) / 2 - 0.5)[4:12, None, None].expand(8, 12, 64)
    torch.testing.assert_close(table[4:12], expected, atol=1e-4, rtol=0)


def test_weights_come_from_a_published_file(published):
    checkpoint = published("vim_nano_patch4_32")
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(checkpoint)})
    backbone.init_weights()
    state = torch.load(checkpoint, weights_only=False)["model"]
    for name in ("layers.5.mixer.A_log", "patch_embed.proj.weight", "norm_f.weight"):
        assert torch.equal(backbone.vim.state_dict()[name], state[name])


def test_averaged_weights_are_taken_on_request(tmp_path):
    state = classifier().state_dict()
    averaged = {k: v + 1 for k, v in state.items()}
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "c.pth")
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "c.pth")}, use_ema=True)
    backbone.init_weights()
    assert torch.equal(backbone.vim.norm_f.weight, averaged["norm_f.weight"])


def test_blocks_past_the_last_map_are_dropped():
    backbone = build(out_indices=(0, 2))
    assert len(backbone.vim.layers) == 3
    backbone.load_classifier(classifier().state_dict())
    assert len(backbone(torch.randn(1, 3, 32, 32))) == 2


def test_without_final_norm_the_residual_stream_is_given():
    source = classifier().eval()
    backbone = build(class_token="keep", final_norm=False).eval()
    assert not any(name.startswith("norm_f") for name, _ in backbone.vim.named_parameters())
    backbone.load_classifier(source.state_dict())
    x = torch.randn(1, 3, 32, 32)
    expected = source.forward_intermediates(x, indices=[1, 5], intermediates_only=True)
    torch.testing.assert_close(backbone(x)[1], expected[1])


def test_rotary_tables_follow_the_grid():
    plain = classifier().state_dict()
    backbone = build(img_size=(40, 56), if_rope=True, if_rope_residual=True)
    plain["rope.freqs_cos"], plain["rope.freqs_sin"] = torch.zeros(64, 64), torch.zeros(64, 64)
    backbone.load_classifier(plain)
    assert backbone.vim.rope.freqs_cos.shape == (10 * 14, 64)
    assert (backbone.vim.rope.freqs_cos[0] == 1).all(), "the first patch is not turned"
    maps = backbone(torch.randn(1, 3, 24, 32))
    assert maps[0].shape == (1, 64, 6, 8)


def test_gradient_checkpointing_changes_memory_only():
    x, gradients = torch.randn(2, 3, 32, 32), []
    for checkpointing in (False, True):
        backbone = build(grad_checkpointing=checkpointing).train()
        loss = sum(m.square().mean() for m in backbone(x))
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.numel()) or t, lambda t: t):
            sum(m.square().mean() for m in backbone(x))
        loss.backward()
        gradients.append(({n: p.grad for n, p in backbone.named_parameters()}, sum(held)))
    (plain, plain_held), (recomputed, held) = gradients
    assert held < plain_held / 2
    for name, gradient in plain.items():
        # The same arithmetic twice; sums of a backward pass may be taken in another order.
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "vim_huge"}, "expected one of vim_base_layernorm_patch16_224, vim_base_patch16_224"),
        ({"arch": "resnet50"}, "arch is 'resnet50'"),
        ({"class_token": "middle"}, "expected 'keep' or 'remove'"),
        ({"out_indices": (1, 6)}, "indices is \\[1, 6\\]"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_a_checkpoint_of_another_width_is_refused():
    from vim.models import CheckpointError

    with pytest.raises(CheckpointError, match="does not fit this"):
        build(depth=6, embed_dim=32).load_classifier(classifier().state_dict())


def test_layer_decay_by_hand():
    from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

    class Segmentor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = MODELS.build({"type": "VimBackbone", **NANO, "class_token": "keep"})
            self.head = torch.nn.Conv2d(64, 3, 1)

    model = Segmentor()
    model.backbone.vim.patch_embed.proj.weight.requires_grad_(False)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build({
        "type": "VimLayerDecayConstructor",
        "optim_wrapper_cfg": {"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}},
        "paramwise_cfg": {"layer_decay_rate": 0.5},
    })  # fmt: skip
    groups = constructor(model).optimizer.param_groups
    of = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    assert set(of) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert of["head.weight"] == (1.0, 0.1)
    assert of["head.bias"] == (1.0, 0.0)
    assert of["backbone.vim.layers.5.mixer.in_proj.weight"] == (0.5, 0.1)
    assert of["backbone.vim.layers.0.mixer.A_log"] == (0.5**6, 0.1)
    assert of["backbone.vim.layers.0.norm.weight"] == (0.5**6, 0.0)
    assert of["backbone.vim.pos_embed"] == (0.5**7, 0.0)
    assert of["backbone.vim.cls_token"] == (0.5**7, 0.0)
    assert of["backbone.vim.norm_f.weight"] == (0.5, 0.0)


@pytest.mark.parametrize("rate", [None, 0, 1.5, "0.9"])
def test_layer_decay_rate_is_checked(rate):
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build({
        "type": "VimLayerDecayConstructor",
        "optim_wrapper_cfg": {"optimizer": {"type": "AdamW", "lr": 1.0}},
        "paramwise_cfg": {"layer_decay_rate": rate},
    })  # fmt: skip
    with pytest.raises(ValueError, match="layer_decay_rate is"):
        constructor(torch.nn.Linear(2, 2))


def test_mmdet_builds_the_pyramid_by_its_name():
    from mmengine.registry import MODELS

    pyramid = MODELS.build({"type": "SimpleFeaturePyramid", "in_channels": 32, "out_channels": 16})
    # The names that checkpoints have: those of mmcv's ConvModule.
    assert {"levels.0.4.conv.weight", "levels.0.5.ln.bias", "levels.2.0.conv.weight"} <= set(pyramid.state_dict())


def test_pyramid_feeds_mmcvs_roi_align():
    """Which takes memory for contiguous: its result on the pyramid's maps is torchvision's."""
    from mmcv.ops import roi_align
    from torchvision import ops

    from vim.dense.pyramid import SimpleFeaturePyramid

    outs = SimpleFeaturePyramid(32, out_channels=16)([torch.randn(2, 32, 8, 8)])
    boxes = torch.tensor([[0, 8.0, 8.0, 40.0, 60.0], [1, 0.0, 30.0, 90.0, 100.0]])
    for out, stride in zip(outs[:4], (4, 8, 16, 32), strict=True):
        own = roi_align(out, boxes, 7, 1 / stride, 0, "avg", True)
        torch.testing.assert_close(own, ops.roi_align(out, boxes, 7, 1 / stride, -1, aligned=True))
