"""What timm's validate.py, train.py and benchmark.py call on a model, in their order, for every registered name.

The scripts are no part of timm's package; docs/model.md shows how to run them. Blocks and images are few here.
"""

import argparse
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.models._factory import resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad, reparameterize_model

import vim
from vim.models import extract_state_dict, load_into

NAMES = timm.list_models("vim_*", exclude_filters="*layernorm*")  # which test_zoo.py takes


def size(name: str) -> int:
    return 16 if "nano" in name else 64


@pytest.mark.parametrize("name", NAMES)
def test_validate(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model(name, depth=2, img_size=size(name))
    torch.save({"state_dict": source.state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "checkpoint.pth.tar")
    request = {"img_size": size(name), "model": name}
    model = timm.create_model(
        **resolve_model_input_args(
            name, request, pretrained=False, num_classes=None, global_pool=None, scriptable=True, depth=2
        )
    )
    load_checkpoint(model, str(tmp_path / "checkpoint.pth.tar"), use_ema=False)
    model = reparameterize_model(model)
    config = resolve_data_config(request, model=model, use_test_size=True)
    assert config["input_size"] == (3, size(name), size(name))
    assert config["interpolation"] == "bicubic"
    images = torch.randn(2, *config["input_size"])
    with torch.inference_mode():
        expected = source.eval()(images)
        model = model.to(device="cpu", dtype=None).to(memory_format=torch.channels_last).eval()
        channels_last = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(model(channels_last)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(channels_last), expected, rtol=1e-4, atol=1e-4)
        logits = model.to(torch.bfloat16)(images.to(torch.bfloat16))
        assert logits.dtype == torch.bfloat16
    assert accuracy(expected, expected.argmax(1), topk=(1, 5)) == [100.0, 100.0]


@pytest.mark.parametrize("name", NAMES)
def test_train(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        **resolve_model_input_args(
            name, {"img_size": size(name)}, pretrained=False, in_chans=3, num_classes=5, drop_rate=0.1,
            drop_path_rate=0.1, drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False,
            checkpoint_path="", depth=3,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.5)
        model.get_classifier().bias.fill_(0.1)
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scales = {g["lr_scale"] for g in optimizer.param_groups}
    assert {round(s, 6) for s in scales} == {round(0.75**k, 6) for k in range(5)}  # stem, three blocks, norm and head
    undecayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert id(model.pos_embed) in undecayed
    assert id(model.layers[0].mixer.A_log) not in undecayed
    average = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model=name), model_ema=average, checkpoint_dir=str(tmp_path)
    )
    model.train()
    images, labels = torch.randn(4, 3, size(name), size(name)), torch.arange(4)
    for mode in ("norm", "value", "agc"):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        dispatch_clip_grad(model_parameters(model, exclude_head="agc" in mode), value=1.0, mode=mode)
        optimizer.step()
        average.update(model)
    saver.save_checkpoint(epoch=0, metric=1.0)
    again = timm.create_model(name, depth=3, num_classes=5, img_size=size(name))
    optimizer = create_optimizer_v2(again, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert resume_checkpoint(again, str(tmp_path / "last.pth.tar"), optimizer=optimizer, log_info=False) == 1
    assert torch.equal(again.eval()(images), model.eval()(images))
    # The average is this project's to evaluate, too.
    load_into(again, extract_state_dict(vim.models.load_checkpoint(tmp_path / "last.pth.tar"), use_ema=True))
    assert torch.equal(again(images), average.module.eval()(images))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_benchmark(precision: torch.dtype) -> None:
    model = timm.create_model(
        "vim_nano_patch4_32", num_classes=None, in_chans=3, global_pool=None, scriptable=False, drop_rate=0.0,
        drop_path_rate=None, drop_block_rate=None,
    )  # fmt: skip
    model.to(device="cpu", dtype=precision, memory_format=torch.channels_last)
    images = torch.randn(2, *resolve_data_config({}, model=model)["input_size"], dtype=precision)
    optimizer = create_optimizer_v2(model.train(), opt="sgd", lr=1e-4)
    loss = F.cross_entropy(model(images), torch.empty(2, dtype=torch.long).random_(model.num_classes))
    loss.backward()
    optimizer.step()
    assert loss.dtype == precision
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with torch.no_grad():
        assert torch.isfinite(model.eval()(images)).all()
