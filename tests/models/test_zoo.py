"""Registered models of what was built on Vim: sizes, and timm's contract for each on narrow models and small images."""

import copy
import io
import logging
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import vim
from vim.models import CheckpointError, from_published, load_into
from vim.models.layout import split_tokens

# FACTS of the papers and the published files.
PARAMETERS = {
    "mambar_tiny_patch16_224": 9_264_232,
    "mambar_small_patch16_224": 27_801_064,
    "mambar_base_patch16_224": 99_301_096,
    "mambar_large_patch16_224": 341_222_376,
    "fastvim_tiny_patch16_224": 7_166_056,
    "fastvim_small_patch16_224": 25_832_680,
    "fastvim_base_patch16_224": 97_670_632,
    "vim_base_layernorm_patch16_224": 97_672_168,
    "videomamba_tiny_patch16_224": 7_148_008,
    "videomamba_small_patch16_224": 25_796_584,
    "videomamba_middle_patch16_224": 74_217_448,
    "videomamba_base_patch16_224": 97_598_440,
    "videomamba_tiny_patch16_f8_224": 7_033_744,
    "videomamba_small_patch16_f8_224": 25_568_656,
    "videomamba_middle_patch16_f8_224": 73_875_856,
    "arm_base_patch16_224": 85_031_656,
    "arm_large_patch16_224": 297_035_720,
    "arm_huge_patch16_224": 662_682_088,
}
# One of each kind: sizes differ in width and depth alone, and in the registers that Mamba-R's head reads.
NAMES = [
    "mambar_tiny_patch16_224", "mambar_large_patch16_224", "fastvim_tiny_patch16_224", "vim_base_layernorm_patch16_224",
    "videomamba_tiny_patch16_224", "videomamba_tiny_patch16_f8_224", "arm_base_patch16_224",
]  # fmt: skip
# Operators one by one where eager fuses them: the same sums in another order, on values of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def narrow(name: str, **kwargs: Any) -> torch.nn.Module:
    """Two blocks of 32 channels, and MLPs in proportion, on images of 64 × 96."""
    if "_f8" in name:
        kwargs = {"num_frames": 2, **kwargs}
    return timm.create_model(name, **{"depth": 2, "embed_dim": 32, "img_size": (64, 96), "num_classes": 5, **kwargs})


def images(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.input_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    config = timm.get_pretrained_cfg(name)
    assert (config.first_conv, config.classifier) == ("patch_embed.proj", "head")
    assert config.license in ("apache-2.0", "cc-by-nc-sa-4.0", "none stated by the authors")


def test_arm_pretraining_parameter_counts() -> None:
    for size, count in (("base", 99_427_328), ("large", 303_942_880)):
        with torch.device("meta"):
            model = from_published(f"pretrain.arm_{size}_pz16")
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    model = narrow(name, drop_path_rate=0.1).eval()
    x = images(model)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    final, maps = model.forward_intermediates(x, indices=[0, 1], norm=True)
    assert [m.shape for m in maps] == [(2, 32, *((2,) if model.num_frames else ()), 4, 6)] * 2
    torch.testing.assert_close(final, features)
    special, patches = split_tokens(features, model.token_layout)
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), patches)
    tokens = model.forward_intermediates(
        x, 1, output_fmt="NLC", stop_early=True, intermediates_only=True, return_prefix_tokens=True
    )
    assert tokens[0][0].shape == patches.shape
    assert tokens[0][1].shape == special.shape == (2, model.num_prefix_tokens, 32)
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)
    model.train()(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    pruned = copy.deepcopy(model).eval()
    assert pruned.prune_intermediate_layers([0]) == [0]
    assert len(pruned.layers) == 1
    model.reset_classifier(0)
    assert model.eval()(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_any_size(name: str) -> None:
    """A dynamic model, `set_input_size` and a checkpoint loaded into another size are the same resampling."""
    torch.manual_seed(0)
    model = narrow(name, dynamic_img_size=True).eval()
    source = copy.deepcopy(model.state_dict())
    x = images(model)[..., :48, :80]
    expected = model(x)
    model.set_input_size((48, 80))
    torch.testing.assert_close(model(x), expected)
    built = narrow(name, img_size=(48, 80)).eval()
    load_into(built, source, grid=(4, 6))
    torch.testing.assert_close(built(x), expected)
    with pytest.raises(ValueError, match="set_input_size"):
        narrow(name)(x)
    model.set_input_size(patch_size=8)
    assert model.patch_embed.grid_size == (6, 10)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("name", NAMES)
def test_torchscript(name: str) -> None:
    torch.manual_seed(0)
    model = narrow(name).eval()
    x = images(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces TorchScript's end on every call
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        scripted = torch.jit.load(file)
    torch.testing.assert_close(scripted(x), model(x), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_fx(name: str) -> None:
    torch.manual_seed(0)
    model = narrow(name).eval()
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=tracer
    ).eval()
    assert torch.equal(next(iter(traced(images(model)).values())), model(images(model)))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_the_meta_device(name: str) -> None:
    model = narrow(name, device="meta", dtype=torch.bfloat16).eval()
    logits = model(images(model).to("meta", torch.bfloat16))
    assert (logits.shape, logits.dtype) == ((2, 5), torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_init_weights_after_to_empty(name: str) -> None:
    """A model made on "meta" gets storage, then values: of the distribution that it would have been built with."""
    torch.manual_seed(0)
    built = narrow(name)
    model = narrow(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    expected = built.state_dict()
    for key, value in model.state_dict().items():
        assert torch.isfinite(value).all(), key
        if value.numel() >= 64 and value.std() > 0:
            assert 0.5 < value.std() / expected[key].std() < 2, key
        elif value.numel() > 1 and value.std() == 0:
            assert torch.equal(value, expected[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compile_and_export(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = narrow(name).eval()
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    compiled(x).sum().backward()
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    three = images(model, 3)
    torch.testing.assert_close(exported.module()(three), model(three), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnx(name: str, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from vim.models.export import export_onnx

    torch.manual_seed(0)
    model = narrow(name).eval()
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = images(model, 3)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"num_registers": 5, "register_reduce": 2}, "must divide num_registers"),
    ({"num_registers": 4, "if_cls_token": True}, "registers take the class token's place"),
    ({"register_reduce": 2}, "give num_registers too"),
    ({"num_registers": -1}, "num_registers is -1"),
    ({"scan_pool": "mean", "bimamba_type": "none"}, "bimamba_type='v2'"),
    ({"norm_after_ssm": True, "if_divide_out": False}, "if_divide_out=True"),
    ({"scan_pool": "median"}, "scan_pool is 'median'"),
    ({"scan_pool": "mean", "if_cls_token": True}, "class tokens and registers would fall into one of them"),
    ({"scan_pool": "mean", "num_registers": 4}, "class tokens and registers would fall into one of them"),
    ({"scan_pool": "mean", "num_frames": 4}, "num_frames cannot be combined with scan_pool"),
    ({"bimamba_type": "v3", "num_frames": 4}, "num_frames cannot be combined with bimamba_type"),
    ({"tubelet_size": 2}, "give num_frames too"),
    ({"num_frames": 2, "tubelet_size": 3}, "shorter than tubelet_size"),
    ({"pad_patches": True, "stride": 4}, "stride equal to the patch size"),
    ({"global_pool": "registers"}, "needs registers"),
    ({"global_pool": "halves"}, "class token in the middle"),
    ({"merge_ratio": 0.6, "if_cls_token": True}, "merge_ratio is 0.6"),
    ({"merge_ratio": 0.2}, "needs a class token or registers"),
    ({"merge_ratio": 0.2, "if_cls_token": True, "bimamba_type": "v3"}, "follows the grid"),
    ({"merge_ratio": 0.2, "if_cls_token": True, "merge_blocks": [2]}, "blocks from 0 to 1"),
    ({"weight_init": "timm"}, "weight_init is 'timm'"),
    ({"mlp_dim": 64, "if_bidirectional": True, "bimamba_type": "none"}, "mlp_dim"),
])  # fmt: skip
def test_impossible_combinations(arguments: dict[str, Any], words: str) -> None:
    kind = {"bimamba_type": "v2", "if_divide_out": True, "final_pool_type": "mean"}
    with pytest.raises(ValueError, match=words):
        vim.VisionMamba(
            **{"depth": 2, "embed_dim": 16, "img_size": 32, "patch_size": 8, "stride": 8, **kind, **arguments}
        )


@pytest.mark.parametrize(("architecture", "arguments", "error", "words"), [
    ("mamba", {}, ValueError, "no architecture 'mamba': expected one of vim, mambar"),
    ("mambar", {"registers": 12}, TypeError, "mambar has no argument registers"),
    ("mambar", {"num_cls_tokens": 0}, ValueError, "at least 1"),
    ("mambar", {"model": "mambar_giant_patch16_224"}, ValueError, "its sizes are tiny, small, base, large"),
    ("fastvim", {"scanpath_type": "zigzag"}, ValueError, "scanpath_type is 'zigzag'"),
    ("arm_pretrain", {"if_abs_pos_embed": True, "depth": 13}, ValueError, "must be 12 or 24, got 13"),
    ("arm_pretrain", {"if_abs_pos_embed": True, "img_size": 224}, ValueError, r"be \(192, 192\), got \(224, 224\)"),
    ("arm_pretrain", {"if_abs_pos_embed": True, "dec_embed_dim": 100}, ValueError, "multiple of 64"),
    ("arm_finetune", {"bimamba_type": "v2"}, ValueError, "parameters that nothing uses"),
    ("arm_finetune", {"bimamba_type": "v3"}, ValueError, "must be True"),
])  # fmt: skip
def test_impossible_published_arguments(architecture, arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        from_published(architecture, **arguments)


def test_options_combine() -> None:
    """Registers in a model with LayerNorm, SwiGLU and another patch order; clips with a class token in the middle."""
    kind = {"depth": 2, "embed_dim": 16, "img_size": 32, "patch_size": 8, "stride": 8, "bimamba_type": "v2",
            "if_divide_out": True, "if_abs_pos_embed": True, "num_classes": 3}  # fmt: skip
    model = vim.VisionMamba(
        **kind, num_registers=4, register_reduce=2, norm_after_ssm=True, mlp_dim=32, column_major=True
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    clips = vim.VisionMamba(**kind, num_frames=4, tubelet_size=2, if_cls_token=True, use_middle_cls_token=True)
    assert clips.token_layout.positions == [16]
    assert clips(torch.randn(2, 3, 4, 32, 32)).shape == (2, 3)


def test_clips_of_another_length() -> None:
    model = narrow("videomamba_tiny_patch16_f8_224", dynamic_img_size=True).eval()
    with torch.no_grad():
        model.temporal_pos_embedding.normal_()
    x = torch.randn(1, 3, 5, 64, 96)
    built = narrow("videomamba_tiny_patch16_f8_224", num_frames=5).eval()
    load_into(built, model.state_dict())
    torch.testing.assert_close(built(x), model(x))
    with pytest.raises(ValueError, match="clips of 5 frames, got 4: build the model with num_frames=4"):
        built(x[:, :, :4])
    with pytest.raises(ValueError, match=r"expected clips \(batch, 3, frames, height, width\)"):
        built(x[:, :, 0])


def test_columns_are_the_transposed_image() -> None:
    """Square patches: a model in column order sees the transposed image as a model in row order sees the image."""
    kind = {"scan_pool": "mean", "bimamba_type": "v2", "if_divide_out": True, "final_pool_type": "mean", "depth": 2,
            "embed_dim": 16, "img_size": (32, 48), "patch_size": 8, "stride": 8, "if_abs_pos_embed": True}  # fmt: skip
    by_columns = vim.VisionMamba(**kind, column_major=True).eval()
    by_rows = vim.VisionMamba(**{**kind, "img_size": (48, 32)}).eval()
    state = by_columns.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].transpose(2, 3)
    by_rows.load_state_dict(state)
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(by_columns(x), by_rows(x.transpose(2, 3)))
    maps = [m.forward_intermediates(i, 1, intermediates_only=True)[0]
            for m, i in ((by_columns, x), (by_rows, x.transpose(2, 3)))]  # fmt: skip
    torch.testing.assert_close(maps[0], maps[1].transpose(2, 3))


def test_the_pooled_scan_is_short() -> None:
    """Each scan runs over one token per row, or per column in every second block."""
    from torch.utils.flop_counter import FlopCounterMode

    from vim.analysis.flops import scan_flops

    model = narrow("fastvim_tiny_patch16_224").eval()
    with FlopCounterMode(display=False) as counter:
        model(images(model, 1))
    flops = counter.get_flop_counts()["Global"][torch.ops.vision_mamba.selective_scan]
    assert flops == 2 * scan_flops(1, 4, 64, 16) + 2 * scan_flops(1, 6, 64, 16)


def test_weights_of_a_release(tmp_path, monkeypatch, caplog) -> None:
    """FastVim's files are Lightning's: averaged weights without a prefix beside those of the backbone."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = narrow("fastvim_tiny_patch16_224")
    state = source.state_dict()
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "FastVim_tiny.ckpt"
    torch.save({"state_dict": {f"backbone.{k}": torch.zeros_like(v) for k, v in state.items()},
                "state_dict_ema": state, "epoch": 1}, file)  # fmt: skip
    model = narrow("fastvim_tiny_patch16_224", pretrained=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    file.unlink()
    overlay = {"url": f"file://{tmp_path}/absent/FastVim_tiny.ckpt"}
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        narrow("fastvim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(CheckpointError, match="no file of published weights is known for arm_base_patch16_224"):
        narrow("arm_base_patch16_224", pretrained=True)


def test_registers_of_another_number(caplog) -> None:
    """Registers, their positions and the head start afresh where the checkpoint has another number of them."""
    source, model = (
        narrow("mambar_tiny_patch16_224", num_registers=4),
        narrow("mambar_tiny_patch16_224", num_registers=3),
    )
    own = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        left_out = load_into(model, source.state_dict(), grid=(4, 6))
    assert set(left_out) == {"cls_token", "pos_embed_cls", "head.weight"}
    assert torch.equal(model.cls_token, own["cls_token"])
    assert torch.equal(model.pos_embed, source.pos_embed)
