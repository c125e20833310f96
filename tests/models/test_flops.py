"""Counting operations: torch's counter sees the scan, and agrees with the table of formulas."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vim
from vim.analysis.flops import FVCORE_HANDLES, count_flops, flop_terms, scan_flops

VARIANTS = json.loads((Path(__file__).parents[1] / "golden" / "variants.json").read_text())


@pytest.mark.parametrize("name", timm.list_models("vim_*", exclude_filters="*layernorm*"))
def test_counter_and_table_agree(name):
    model = timm.create_model(name, device="meta")
    terms = flop_terms(model)
    assert sum(terms.values()) == count_flops(model)
    assert terms["scan"] > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_counter_and_table_agree_on_variants(variant):
    model = vim.VisionMamba(**VARIANTS[variant])
    assert 2 * sum(flop_terms(model).values()) == count_flops(model, batch=2)


def test_tiny_is_1_5_g_multiply_adds():
    terms = flop_terms(timm.create_model("vim_tiny_patch16_224", device="meta"))
    assert 1.45e9 < sum(terms.values()) / 2 < 1.55e9
    # By hand: 24 blocks, two directions, 197 tokens, 384 channels, 16 states.
    assert terms["scan"] == 24 * 2 * 197 * 384 * (7 * 16 + 8) == 24 * 2 * scan_flops(1, 197, 384, 16)


def test_eager_calls_are_counted_with_their_backward():
    """On real tensors, where calls otherwise bypass the dispatcher, and with the same result."""
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", depth=2)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    with FlopCounterMode(display=False) as counter:
        logits = model(x)
        forward = counter.get_total_flops()
        logits.sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert forward == count_flops(model, batch=2)
    ops = torch.ops.vision_mamba
    counts = counter.get_flop_counts()["Global"]
    assert counts[ops.selective_scan_backward] == 3 * counts[ops.selective_scan]
    assert counts[ops.causal_conv1d_backward] == 3 * counts[ops.causal_conv1d]
    assert counter.get_total_flops() > 2.9 * forward


@pytest.mark.parametrize("name", ["fastvim_tiny_patch16_224", "vim_base_layernorm_patch16_224", "arm_base_patch16_224"])
def test_other_parts_are_counted_as_a_whole(name):
    model = timm.create_model(name, depth=2, embed_dim=32, img_size=64).eval()
    assert count_flops(model, 2) == 2 * count_flops(model) > 0
    with pytest.raises(ValueError, match="use count_flops"):
        flop_terms(model)


@pytest.mark.filterwarnings("ignore")  # fvcore traces with torch.jit, which is deprecated
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_fvcore_counts_multiply_adds(kind):
    from fvcore.nn import FlopCountAnalysis

    model = timm.create_model("vim_nano_patch4_32", depth=2, bimamba_type=kind).eval()
    analysis = FlopCountAnalysis(model, torch.randn(2, 3, 32, 32)).set_op_handle(**FVCORE_HANDLES)
    # Its hooks let the mixer call torch's padded convolution: a few taps more and no SiLU, half a percent in all.
    assert 2 * analysis.total() == pytest.approx(count_flops(model, batch=2), rel=0.01)
    assert 2 * analysis.by_operator()["selective_scan"] == 2 * flop_terms(model)["scan"]
    assert not [name for name in analysis.unsupported_ops() if name.startswith("vision_mamba")]


def test_torchinfo_lists_every_layer_and_parameter():
    import torchinfo

    model = timm.create_model("vim_nano_patch4_32", depth=2).eval()
    summary = torchinfo.summary(model, input_data=torch.randn(2, 3, 32, 32), depth=4, verbose=0)
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    seen = [info.var_name for info in summary.summary_list if info.class_name in ("Linear", "Conv1d")]
    assert sorted(seen) == sorted(
        2 * ["in_proj", "conv1d", "x_proj", "dt_proj", "conv1d_b", "x_proj_b", "dt_proj_b", "out_proj"] + ["head"]
    )
