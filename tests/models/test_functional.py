"""`torch.func` over whole models: the gradients of a loop from vmap, and Jacobians."""

import pytest
import timm
import torch
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import vim  # noqa: F401  registers the models

VARIANTS = {
    "published": {},
    "layernorm": {"rms_norm": False},
    "v1": {"bimamba_type": "v1", "if_divide_out": False},
    "one direction": {"bimamba_type": "none", "if_divide_out": False},
    "pooled": {"norm_after_ssm": True, "scan_pool": "mean", "if_cls_token": False, "final_pool_type": "mean"},
    "crossed": {"bimamba_type": "v3"},
    "rope": {"if_rope": True},
    "mlp": {"mlp_dim": 24},
    "registers": {"num_registers": 4, "if_cls_token": False},
}


def make(**options) -> torch.nn.Module:
    return timm.create_model("vim_nano_patch4_32", depth=2, img_size=16, num_classes=5, **options).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_per_sample_gradients(variant: str) -> None:
    torch.manual_seed(0)
    model, x = make(**VARIANTS[variant]), images()
    parameters = dict(model.named_parameters())

    def of_sample(parameters: dict, image: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    per_sample = vmap(grad(of_sample), (None, 0))(parameters, x)
    for index, image in enumerate(x):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # Operator by operator in place of the fused mixer: some float32 roundings of the largest entry.
            close = {"rtol": 1e-4, "atol": 2e-5 * expected.abs().max().item() + 1e-9}
            torch.testing.assert_close(per_sample[name][index], expected, **close)


def test_jacobians_and_ensembles() -> None:
    torch.manual_seed(0)
    models, x = [make() for _ in range(2)], images(1)
    leaf = x.clone().requires_grad_()
    rows = torch.stack([torch.autograd.grad(logit, leaf, retain_graph=True)[0] for logit in models[0](leaf)[0]])
    torch.testing.assert_close(jacrev(lambda x: models[0](x)[0])(x), rows, rtol=1e-4, atol=1e-6)
    parameters, buffers = stack_module_state(models)
    with torch.no_grad():
        together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(together, torch.stack([m(x) for m in models]), rtol=1e-4, atol=1e-6)


def test_functional_call_takes_other_weights() -> None:
    """On the fast path: the weights of the call, and no others, with and without gradients."""
    torch.manual_seed(0)
    model, other, x = make(), make(), images()
    with torch.no_grad():
        assert torch.equal(functional_call(model, dict(other.named_parameters()), (x,)), other(x))
    functional_call(model, dict(other.named_parameters()), (x,)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())
