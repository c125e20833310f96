"""The Mamba module: parameters, token-by-token inference, and what it refuses."""

import pytest
import torch
from mamba_ssm_vim import Mamba, bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj
from mamba_ssm_vim.utils.generation import InferenceParams


def make(seed=0, **arguments) -> Mamba:
    torch.manual_seed(seed)
    return Mamba(24, d_state=8, **arguments)


def tokens(batch=2, seqlen=11, dtype=torch.float32):
    return torch.randn(batch, seqlen, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", [{}, {"d_conv": 2, "bias": True, "conv_bias": False}, {"init_layer_scale": 0.5}])
def test_steps_are_the_forward_pass(arguments, dtype):
    mamba, x = make(layer_idx=0, dtype=dtype, **arguments), tokens(dtype=dtype)
    with torch.no_grad():
        expected = mamba(x)
        conv_state, ssm_state = mamba.allocate_inference_cache(2, max_seqlen=11)
        assert ssm_state.dtype == torch.float32
        steps = [mamba.step(x[:, t : t + 1], conv_state, ssm_state)[0] for t in range(11)]
    # float32: a hundred roundings. bfloat16: the mixer keeps the step's projection in float32, a step rounds it and
    # the convolution's input (2^-9 each) in the same places as the whole pass, up to their order.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    error = (torch.cat(steps, dim=1).float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= tolerance


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_a_prompt_and_then_tokens(prompt):
    """The published protocol: whole prompt at offset 0, then one token at a time, states in the cache by layer_idx."""
    mamba, x = make(layer_idx=3), tokens()
    with torch.no_grad():
        expected = mamba(x)
        cache = InferenceParams(max_seqlen=11, max_batch_size=2)
        for _ in range(2):  # the second time the cache is used again from the start
            cache.seqlen_offset = 0
            out = [mamba(x[:, :prompt], inference_params=cache)]
            for t in range(prompt, 11):
                cache.seqlen_offset = t
                out.append(mamba(x[:, t : t + 1], inference_params=cache))
            torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=1e-4, atol=1e-5)
            cache.reset(11, 2)
    assert list(cache.key_value_memory_dict) == [3]


def test_several_tokens_at_a_time_and_gradients():
    mamba, x = make(), tokens().requires_grad_()
    states = mamba.allocate_inference_cache(2, 11)
    out = torch.cat([mamba.step(piece, *states)[0] for piece in x.split([4, 1, 6], dim=1)], dim=1)
    torch.testing.assert_close(out, mamba(x), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in mamba.parameters())
    assert not any(s.requires_grad for s in states)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_bidirectional_mixers_refuse_to_step(kind):
    mamba = make(bimamba_type=kind, layer_idx=0)
    with pytest.raises(ValueError, match="sees the whole sequence at once"):
        mamba(tokens(), inference_params=InferenceParams(11, 2))
    with pytest.raises(ValueError, match="sees the whole sequence at once"):
        mamba.step(tokens(seqlen=1), torch.zeros(2, 48, 4), torch.zeros(2, 48, 8))


def test_cache_misuse_is_named():
    with pytest.raises(ValueError, match="layer_idx"):
        make()(tokens(), inference_params=InferenceParams(11, 2))
    mamba, cache = make(layer_idx=0), InferenceParams(11, 2)
    mamba(tokens(), inference_params=cache)
    with pytest.raises(ValueError, match="made for a batch of 2, got 3"):
        mamba(tokens(batch=3), inference_params=cache)


def test_published_arguments():
    """Names and positions of the published constructor; both spellings of the division."""
    torch.manual_seed(0)
    first = Mamba(
        24, 8, 4, 2, "auto", 0.001, 0.1, "random", 1.0, 1e-4, True, False, True, 5, None, None, "v2", True, 0.1
    )
    assert (first.layer_idx, first.bimamba_type, first.if_divide_out) == (5, "v2", True)
    torch.testing.assert_close(first.gamma, torch.full((24,), 0.1))
    second = make(bimamba_type="v2", if_devide_out=True, init_layer_scale=0.1)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(tokens()), second(tokens()))
    whole = make(bimamba_type="v2", init_layer_scale=0.1)
    whole.load_state_dict(first.state_dict())
    torch.testing.assert_close(whole(tokens()), 2 * first(tokens()))


@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_is_the_composition_of_the_published_functions(kind):
    mamba, x = make(bimamba_type=kind, if_divide_out=True), tokens()
    with torch.no_grad():
        for p in mamba.parameters():  # the two directions start out alike
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)

    def inner(suffix):
        module = {n: getattr(mamba, n + suffix) for n in ("conv1d", "x_proj", "dt_proj")}
        return module["conv1d"].weight, module["conv1d"].bias, module["x_proj"].weight, module["dt_proj"].weight

    xz, A, bias = mamba.in_proj(x).transpose(1, 2), -torch.exp(mamba.A_log), mamba.dt_proj.bias
    out_proj = mamba.out_proj.weight, mamba.out_proj.bias
    if kind == "none":
        expected = mamba_inner_fn(xz, *inner(""), *out_proj, A, None, None, mamba.D, bias)
    elif kind == "v1":
        A_b = -torch.exp(mamba.A_b_log)
        expected = bimamba_inner_fn(xz, *inner(""), *out_proj, A, A_b, None, None, mamba.D, bias)
    else:
        A_b, bias_b = -torch.exp(mamba.A_b_log), mamba.dt_proj_b.bias
        there = mamba_inner_fn_no_out_proj(xz, *inner(""), A, None, None, mamba.D, bias)
        back = mamba_inner_fn_no_out_proj(xz.flip(-1), *inner("_b"), A_b, None, None, mamba.D_b, bias_b).flip(-1)
        expected = mamba.out_proj((there + back).transpose(1, 2) / 2)
    torch.testing.assert_close(mamba(x), expected, rtol=1e-4, atol=1e-5)


def test_v1_has_one_parameter_more():
    assert {n for n, _ in make(bimamba_type="v1").named_parameters() if "_b" in n} == {"A_b_log"}
