"""The language model against transformers' `MambaForCausalLM` with the same weights, and its files."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from mamba_ssm_vim.models.config_mamba import MambaConfig, config_from_dict
from mamba_ssm_vim.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, create_block
from mamba_ssm_vim.modules import block, mamba_simple
from mamba_ssm_vim.utils.generation import InferenceParams
from mamba_ssm_vim.utils.hf import load_config_hf, load_state_dict_hf
from torch import nn

SIZES = {"d_model": 24, "n_layer": 2, "vocab_size": 61}


def build(**changes) -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**(SIZES | changes)))
    with torch.no_grad():  # at initialisation all norms' weights are 1, and scores are near 0
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
        model.backbone.embedding.weight.mul_(20)
    return model


def theirs(model: MambaLMHeadModel, folder) -> transformers.MambaForCausalLM:
    model.save_pretrained(folder, layout="transformers")
    return transformers.MambaForCausalLM.from_pretrained(folder)


def tokens(batch=2, seqlen=11):
    return torch.randint(0, SIZES["vocab_size"], (batch, seqlen), generator=torch.Generator().manual_seed(1))


# float32: two layers of sums of up to 100 terms, each rounded to 6e-8 of sizes up to 10, in another order: 1e-5 leaves
# ten times that. float64: transformers rounds B to float32, a relative error of 6e-8 of each scan's terms.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 2e-6)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "residual_in_fp32": False, "norm_epsilon": 1e-2},
        {"ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 7, "bias": True, "conv_bias": False}},
    ],
    ids=["default", "untied", "sizes"],
)
def test_logits_loss_and_gradients_are_those_of_transformers(changes, dtype, tolerance, tmp_path):
    # A float32 residual stream would round what is compared in float64.
    ours = build(**{"residual_in_fp32": dtype is torch.float32} | changes)
    other = theirs(ours, tmp_path).to(dtype)
    ours, ids = ours.to(dtype), tokens()
    expected = other(ids, labels=ids)
    logits = ours(ids).logits
    torch.testing.assert_close(logits.to(expected.logits.dtype), expected.logits, rtol=tolerance, atol=tolerance)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance, atol=tolerance, check_dtype=False)
    loss.backward()
    expected.loss.backward()
    gradients = {n.replace("embeddings", "embedding"): p.grad for n, p in other.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=10 * tolerance * max(scale, 1e-3), msg=name)


def test_both_layouts_load_into_each_other(tmp_path):
    model, ids = build(), tokens()
    other = theirs(model, tmp_path / "from_ours")
    other.save_pretrained(tmp_path / "from_theirs")  # their own writer
    model.save_pretrained(tmp_path / "published")
    assert {p.name for p in (tmp_path / "published").iterdir()} == {"config.json", "pytorch_model.bin"}
    for folder in ("from_ours", "from_theirs", "published"):
        again = MambaLMHeadModel.from_pretrained(tmp_path / folder)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.lm_head.weight is again.backbone.embedding.weight
    # A published file, as transformers takes it.
    other = transformers.MambaForCausalLM(
        transformers.MambaConfig(**json.loads((tmp_path / "from_ours/config.json").read_text()))
    )
    other.load_state_dict(load_state_dict_hf(tmp_path / "published"))
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)


def test_weights_in_several_files(tmp_path):
    model = build()
    other = theirs(model, tmp_path / "one")
    other.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert not (tmp_path / "many/model.safetensors").exists()
    again = MambaLMHeadModel.from_pretrained(tmp_path / "many", dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype is torch.bfloat16
    assert again.backbone.layers[0].mixer.A_log.dtype is torch.float32
    index = tmp_path / "many/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../one/model.safetensors"}}))
    with pytest.raises(ValueError, match="is no index of weights: its files must lie beside it"):
        load_state_dict_hf(tmp_path / "many")


def test_published_configurations(tmp_path):
    published = {
        "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    config = config_from_dict(published)
    assert config.padded_vocab_size == 50280
    assert config.to_dict() == published | {"tie_embeddings": True}
    hf = transformers.MambaConfig(hidden_size=40, num_hidden_layers=3, vocab_size=50, state_size=8, time_step_rank=4)
    hf.save_pretrained(tmp_path)
    config = config_from_dict(load_config_hf(tmp_path))
    assert (config.d_model, config.n_layer, config.padded_vocab_size, config.norm_epsilon) == (40, 3, 50, 1e-5)
    assert config.ssm_cfg == {"d_state": 8, "dt_rank": 4}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model_type": "falcon_mamba"}, "'falcon_mamba' model, expected 'mamba'"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"d_model": 8, "heads": 4}, "fields that a Mamba model does not: heads"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "'Mamba2' layers, but only 'Mamba1' is provided"),
        ({"attn_layer_idx": [1]}, "are not provided"),
        ({"n_layer": 0}, "n_layer is 0, expected a whole number of at least 1"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, expected a whole number of at least 1 and at most 4,096"),
        ({"ssm_cfg": {"d_state": 10**9}}, "d_state of ssm_cfg is 1000000000, expected"),
        ({"ssm_cfg": [1]}, r"ssm_cfg is \[1\], expected a mapping"),
        ({"d_model": "24"}, "d_model is '24', expected a whole number"),
        ([], "the configuration is a list"),
    ],
)
def test_configurations_of_other_models_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(data)


class Command:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    build().save_pretrained(tmp_path)
    weights = tmp_path / "pytorch_model.bin"
    content = weights.read_bytes()
    torch.save({"a": Command()}, weights)
    with pytest.raises(ValueError, match="holds more than tensors, which could run code"):
        load_state_dict_hf(tmp_path)
    assert "executed" not in capsys.readouterr().out
    where = content.index(build().lm_head.weight.detach().numpy().tobytes()[:64])
    weights.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    with pytest.raises(ValueError, match=r"is damaged: .* does not match its checksum"):
        load_state_dict_hf(tmp_path)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_state_dict_hf(tmp_path)
    torch.save([1], weights)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_state_dict_hf(tmp_path)
    build(n_layer=3).save_pretrained(tmp_path / "other")
    weights.write_bytes((tmp_path / "other/pytorch_model.bin").read_bytes())
    with pytest.raises(ValueError, match=r"do not fit its configuration: backbone\.layers\.2.* and others are missing"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_config_hf(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds none of config\.json"):
        load_config_hf(tmp_path)
    with pytest.raises(ValueError, match="is no folder, and no hub id"):
        load_config_hf(tmp_path / "nothing")
    monkeypatch.setattr("mamba_ssm_vim.utils.hf.has_address", lambda url: False)
    with pytest.raises(
        ValueError, match=r"^config\.json of state-spaces/none could not be downloaded \(.*its folder instead$"
    ):
        MambaLMHeadModel.from_pretrained("state-spaces/none")
    with pytest.raises(ValueError, match="layout is 'gguf', expected one of mamba_ssm, transformers"):
        build().save_pretrained(tmp_path, layout="gguf")


@pytest.mark.parametrize("rms_norm", [True, False])
@pytest.mark.parametrize("parts", [[7, 1, 1, 2], [1] * 11])
def test_parts_give_what_the_whole_gives(rms_norm, parts):
    model, ids = build(rms_norm=rms_norm).eval(), tokens()
    with torch.no_grad():
        whole, found = model(ids).logits, []
        params = InferenceParams(max_seqlen=11, max_batch_size=2)
        for part in ids.split(parts, dim=1):
            found.append(model(part, inference_params=params).logits)
            params.seqlen_offset += part.shape[1]
        last = model(ids, num_last_tokens=3).logits
    # As above: float32 sums in another order.
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(last, whole[:, -3:], rtol=2e-5, atol=2e-5)


def test_initialisation():
    torch.manual_seed(0)
    model = MixerModel(64, 16, 1000, ssm_cfg={"bias": True}, initializer_cfg={"initializer_range": 0.5})
    assert 0.48 < model.embedding.weight.std() < 0.52  # of 64,000 values: 1e-3 is a deviation of the estimate
    mixer = model.layers[0].mixer
    # Uniform within 1 / sqrt(fan_in), smaller by sqrt of 16 layers.
    assert 0.9 < mixer.out_proj.weight.abs().max() * 4 * 128**0.5 <= 1.0
    assert not mixer.in_proj.bias.any()
    assert mixer.dt_proj.bias.all()


def test_blocks_of_both_releases():
    def mixer(dim):
        return mamba_simple.Mamba(dim, layer_idx=0)

    first = mamba_simple.Block(8, mixer, nn.LayerNorm, True, True)
    second = block.Block(8, mixer, lambda dim: nn.Linear(dim, dim), nn.LayerNorm, True, True)
    second.load_state_dict(first.state_dict(), strict=False)
    x, residual = torch.randn(2, 5, 8).bfloat16().float(), torch.randn(2, 5, 8)
    hidden, total = first(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(hidden, first.mixer(first.norm(total)))
    with_mlp, after = second(x, residual)
    torch.testing.assert_close(after, total + hidden)
    torch.testing.assert_close(with_mlp, second.mlp(second.norm2(after)))
    # A norm that does more than its class says is called.
    calls = []
    first.norm.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(first(x, residual)[0], hidden)
    assert calls == [1]
    assert (
        create_block(8, layer_idx=3, rms_norm=True, residual_in_fp32=True)(x.bfloat16().float())[1].dtype
        is torch.float32
    )
