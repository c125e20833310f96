"""A step of native code against the model's own modules."""

import os
import subprocess
import sys

import pytest
import torch
from mamba_ssm_vim import use_backend
from mamba_ssm_vim.cpu_library import library
from mamba_ssm_vim.models.config_mamba import MambaConfig
from mamba_ssm_vim.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm_vim.models.native_decoder import MOST_SEQUENCES, why_not
from mamba_ssm_vim.utils.generation import InferenceParams, decode

pytestmark = pytest.mark.skipif(library.reason is not None, reason="needs the native library")

SIZES = {  # whole vectors of every instruction set; less than one; odd ones; more states than lanes
    "even": {"d_model": 32, "ssm_cfg": {"d_state": 16, "dt_rank": 16}},
    "small": {"d_model": 3, "ssm_cfg": {"d_state": 2, "dt_rank": 1, "expand": 1, "d_conv": 2}},
    "odd": {"d_model": 37, "ssm_cfg": {"d_state": 5, "dt_rank": 7, "d_conv": 3, "bias": True, "conv_bias": False}},
    "states": {"d_model": 20, "ssm_cfg": {"d_state": 37}, "rms_norm": False, "tie_embeddings": False},
}


def build(config: dict, dtype=torch.float32) -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(n_layer=2, vocab_size=41, pad_vocab_size_multiple=1, **config), dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or (name.endswith("bias") and "dt_proj" not in name):
                p.add_(torch.rand_like(p) - 0.5)
        model.backbone.embedding.weight.mul_(20)
    return model.eval()


def start(model: MambaLMHeadModel, batch: int) -> tuple[torch.Tensor, InferenceParams]:
    ids = torch.randint(0, 41, (batch, 9), generator=torch.Generator().manual_seed(1))
    params = InferenceParams(max_seqlen=9, max_batch_size=batch)
    model(ids[:, :4], inference_params=params)
    params.seqlen_offset = 4
    return ids[:, 4:], params


@torch.inference_mode()
def check_steps(config: dict, dtype: torch.dtype, batch: int) -> None:
    # float32: sums of up to 100 terms in another order, as in test_language_model.py. Of 16 bits, the modules round
    # every activation, the step none: ten roundings of 2^-9 or 2^-12 of values below 4.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 40 * 2**-9, torch.float16: 40 * 2**-12}[dtype]
    model = build(config, dtype)
    (ids, expected_cache), (_, cache) = start(model, batch), start(model, batch)
    decoder = model.decoder(cache)
    assert decoder is not None, why_not(model, cache)
    for token in ids.split(1, dim=1):
        expected = model(token, inference_params=expected_cache).logits
        found = decoder(token)
        assert found.shape == expected.shape
        assert found.dtype is dtype
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)
    for layer, states in expected_cache.key_value_memory_dict.items():
        for found, expected in zip(cache.key_value_memory_dict[layer], states, strict=True):
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_steps_are_those_of_the_modules(config, dtype, batch):
    check_steps(config, dtype, batch)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    if isa == "avx2" and library.instruction_set == "baseline":
        pytest.skip("this machine has no AVX2")
    code = (
        "import torch, test_native_decoder as t\n"
        "for config in t.SIZES.values():\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "        t.check_steps(config, dtype, 3)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(__file__), env={**os.environ, "VIM_CPU_ISA": isa},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_threads_and_batch_do_not_change_bits():
    model = build({"d_model": 130, "ssm_cfg": {}})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                ids, cache = start(model, 3)
                decoder = model.decoder(cache)
                found.append(torch.cat([decoder(token) for token in ids.split(1, dim=1)], dim=1))
    finally:
        torch.set_num_threads(before)
    # The prompt's states come from kernels whose sums may depend on the threads' share; here they do not.
    assert torch.equal(*found)


def test_not_used_where_it_would_do_something_else(monkeypatch):
    model = build(SIZES["even"])
    _, cache = start(model, 2)

    def reason() -> str | None:
        found = why_not(model, cache)
        assert (model.decoder(cache) is None) == (found is not None)
        return found

    assert reason() is None
    with torch.autocast("cpu", torch.bfloat16):
        assert reason() == "autocast or another mode of torch is on"
    with use_backend("reference"):
        assert reason() == "backend 'reference' is forced"
    for module in (model, model.backbone, model.backbone.layers[1], model.backbone.layers[1].mixer, model.lm_head):
        hook = module.register_forward_hook(lambda *_: None)
        assert reason() is not None
        hook.remove()
    model.backbone.layers[1].mixer.out_proj = torch.nn.Sequential(model.backbone.layers[1].mixer.out_proj)
    assert reason() == "layer 1: it has parts that must be called"
    model = build(SIZES["even"])
    assert why_not(model, InferenceParams(9, 2)) == "layer 0: it has no states: run the model on the prompt first"
    small = build(SIZES["small"])
    mixed = build(SIZES["even"])
    mixed.backbone.layers[1] = small.backbone.layers[1]
    assert why_not(mixed, cache).startswith("layer 1: in_proj has another shape")
    assert why_not(model, start(small, 2)[1]) == "layer 0: its states have other shapes"
    other = start(model, 2)[1]
    other.key_value_memory_dict[1] = start(model, 3)[1].key_value_memory_dict[1]
    assert why_not(model, other) == "layer 1: its states have other shapes"
    model.backbone.layers[0].mixer.x_proj.bfloat16()
    assert why_not(model, cache).startswith("layer 0: x_proj has another shape, dtype")
    model = build(SIZES["even"])
    assert "more than 64 sequences" in why_not(model, start(model, MOST_SEQUENCES + 1)[1])
    halves = InferenceParams(9, 2, key_value_memory_dict=model.allocate_inference_cache(2, 9, torch.bfloat16))
    assert why_not(model, halves) == "layer 0: its states are torch.bfloat16 and torch.bfloat16"
    assert why_not(model.double(), cache) == "torch.float64 is none of float32, bfloat16, float16"


def test_a_batch_of_another_size_is_refused():
    model = build(SIZES["even"])
    decoder = model.decoder(start(model, 2)[1])
    for shape in ((1, 1), (2, 2)):
        with pytest.raises(ValueError, match=r"input_ids must be \(2, 1\), got"):
            decoder(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(IndexError):
        decoder(torch.full((2, 1), 41))


def test_generation_takes_it_and_agrees_without_it(monkeypatch):
    model, prompts = build(SIZES["even"]), torch.randint(0, 41, (3, 5), generator=torch.Generator().manual_seed(2))
    calls = []
    make = model.decoder
    monkeypatch.setattr(model, "decoder", lambda params: calls.append(1) or make(params), raising=False)
    fast = decode(prompts, model, 20)
    monkeypatch.setattr(model, "decoder", lambda params: None)
    slow = decode(prompts, model, 20)
    assert calls == [1]
    assert torch.equal(fast.sequences, slow.sequences)
    # As above, over 15 steps.
    torch.testing.assert_close(torch.stack(fast.scores), torch.stack(slow.scores), rtol=1e-4, atol=1e-4)
