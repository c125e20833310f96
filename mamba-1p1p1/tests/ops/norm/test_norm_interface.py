"""The published norm functions of both generations, against torch's own norms."""

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm_vim.ops.triton import layer_norm, layernorm


def make(*, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, residual, x1 = (torch.randn(3, 5, 16, generator=g).to(dtype) for _ in range(3))
    weight, bias, weight1, bias1 = (torch.randn(16, generator=g) for _ in range(4))
    return x, residual, x1, weight, bias, weight1, bias1


def norm(total, weight, bias, rms, eps):
    if rms:
        y = F.rms_norm(total, (16,), weight, eps)
        return y if bias is None else y + bias
    return F.layer_norm(total, (16,), weight, bias, eps)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("module", [layernorm, layer_norm])
def test_norm_and_linear_layer(module, rms):
    x, residual, _, weight, bias, *_ = make()
    matrix = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    expected = F.linear(norm(x + residual, weight, bias, rms, 1e-4), matrix, bias[:6])
    for f in (module.layer_norm_linear_fn, module.LayerNormLinearFn.apply):
        y, total = f(x, weight, bias, matrix, bias[:6], residual, 1e-4, True, False, rms)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(total, x + residual)
        y, total = f(x.bfloat16(), weight, bias, matrix, None, eps=1e-4, prenorm=True, residual_in_fp32=True)
        assert (y.dtype, total.dtype) == (torch.float32, torch.float32)
    settings = {"eps": 1e-4, "prenorm": True, "is_rms_norm": rms}
    found = (
        module.LayerNormFn.apply(x, weight, bias, residual, 1e-4, True, False, rms)
        if module is layernorm
        else module.LayerNormFn.apply(x, weight, bias, residual, None, None, None, 1e-4, 0.0, None, True, False, rms)
    )
    for a, b in zip(found, module.layer_norm_fn(x, weight, bias, residual, **settings), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("module", [layernorm, layer_norm])
def test_operator_and_reference(module, with_residual, rms):
    x, residual, _, weight, bias, *_ = make()
    residual = residual if with_residual else None
    function, reference = (
        (module.rms_norm_fn, module.rms_norm_ref) if rms else (module.layer_norm_fn, module.layer_norm_ref)
    )
    total = x if residual is None else x + residual
    expected = norm(total, weight, bias, rms, 1e-4)
    for f in (function, reference):
        y, out = f(x, weight, bias, residual=residual, eps=1e-4, prenorm=True)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(out, total)
        torch.testing.assert_close(f(x, weight, bias, residual, eps=1e-4), expected)


@pytest.mark.parametrize("module", [layernorm, layer_norm])
def test_dtypes(module):
    """16-bit input: y in its dtype; the residual in float32 when asked for, or where it already is."""
    x, residual, _, weight, bias, *_ = make(dtype=torch.bfloat16)
    y, out = module.rms_norm_fn(x, weight, bias, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    y, out = module.rms_norm_fn(x, weight, bias, residual.float(), prenorm=True)
    assert (y.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    y, out = module.layer_norm_ref(x, weight, bias, residual, prenorm=True, upcast=True)
    assert (y.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    y, out = module.layer_norm_ref(x, weight, bias, residual, prenorm=True)
    assert (y.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16)


def test_argument_order_of_the_first_generation():
    x, residual, _, weight, bias, *_ = make()
    y, out = layernorm.layer_norm_fn(x, weight, bias, residual, 1e-4, True, False, True)
    torch.testing.assert_close(y, norm(x + residual, weight, bias, True, 1e-4))
    torch.testing.assert_close(out, x + residual)


@pytest.mark.parametrize("rms", [False, True])
def test_second_branch_and_second_norm(rms):
    x, residual, x1, weight, bias, weight1, bias1 = make()
    function, reference = (
        (layer_norm.rms_norm_fn, layer_norm.rms_norm_ref)
        if rms
        else (layer_norm.layer_norm_fn, layer_norm.layer_norm_ref)
    )
    total = x + x1 + residual
    for f in (function, reference):
        y, y1, out = f(x, weight, bias, residual, x1, weight1, bias1, 1e-4, prenorm=True)
        torch.testing.assert_close(out, total)
        torch.testing.assert_close(y, norm(total, weight, bias, rms, 1e-4))
        torch.testing.assert_close(y1, norm(total, weight1, bias1, rms, 1e-4))


def test_row_factors_and_their_gradient():
    x, residual, _, weight, bias, *_ = make()
    scale = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, scale)]
    y = layer_norm.rms_norm_fn(leaves[0], leaves[2], bias, leaves[1], rowscale=leaves[3])
    expected = norm(leaves[0] * leaves[3].unsqueeze(-1) + leaves[1], leaves[2], bias, True, 1e-6)
    torch.testing.assert_close(y, expected)
    actual = torch.autograd.grad(y.square().sum(), leaves)
    for a, e in zip(actual, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second", [False, True])
def test_dropout_gives_the_masks_it_used(second):
    x, residual, x1, weight, bias, *_ = make()
    x1 = x1 if second else None
    torch.manual_seed(3)
    y, out, mask, mask1 = layer_norm.layer_norm_fn(
        x, weight, bias, residual, x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert 0 < (~mask).sum() < mask.numel()
    assert (mask1 is None) == (not second)
    given = {"dropout_mask": mask, "dropout_mask1": mask1}
    expected, total = layer_norm.layer_norm_ref(x, weight, bias, residual, x1, dropout_p=0.25, prenorm=True, **given)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(out, total)
    gone = ~mask & ~mask1 if second else ~mask
    assert torch.equal(out[gone], residual[gone])


def test_modules():
    x, residual, *_ = make()
    plain, dropping = layernorm.RMSNorm(16), layer_norm.RMSNorm(16, dropout_p=0.5)
    assert plain.state_dict().keys() == dropping.state_dict().keys() == {"weight"}
    torch.testing.assert_close(dropping.eval()(x, residual), plain(x, residual))
    torch.manual_seed(0)
    assert not torch.equal(dropping.train()(x, residual), plain(x, residual))
    with pytest.raises(ValueError, match="dropout_p is 'cpu'"):  # third in release 1 was the device
        layernorm.RMSNorm(16, 1e-5, "cpu")


def test_bad_arguments_are_named():
    x, residual, x1, weight, bias, _, bias1 = make()
    for what, arguments in {
        "rowscale cannot": {"x1": x1, "rowscale": torch.ones(3, 5)},
        "rowscale must": {"rowscale": torch.ones(5)},
        "x1 must": {"x1": x1[:1]},
        "bias1 needs": {"bias1": bias1},
        "dropout_p": {"dropout_p": 1.0},
    }.items():
        with pytest.raises(ValueError, match=what):
            layer_norm.layer_norm_fn(x, weight, bias, residual, **arguments)
