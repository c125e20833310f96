"""A model under `torch.set_default_dtype`: built in that dtype as torch's modules are, computing the same as ever."""

import contextlib

import pytest
import timm
import torch

import vim  # noqa: F401  registers the models

VARIANTS = {"plain": {}, "rope": {"if_rope": True, "if_rope_residual": True, "if_cls_token": False}}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def step(model, images):
    """Logits at two image sizes, and the gradients of their sum of squares."""
    model.zero_grad()
    logits = torch.cat([model(images), model(images[..., :24])])
    logits.float().square().sum().backward()
    return [logits, *(p.grad.clone() for p in model.parameters())]


def build(variant, **factory):
    torch.manual_seed(0)
    model = timm.create_model(
        "vim_nano_patch4_32", depth=2, num_classes=3, dynamic_img_size=True, **VARIANTS[variant], **factory
    )
    torch.nn.init.normal_(model.head.weight)
    model.layers[0].reset_parameters()
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_model_does_not_depend_on_the_default_dtype(dtype, variant):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    made = []
    for default in (torch.float32, dtype):
        with default_dtype(default):
            model = build(variant, dtype=torch.float32)
            made.append([*model.state_dict().values(), *step(model, images)])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))

    with default_dtype(dtype):
        model = build(variant)
        under = step(model, images.to(dtype))
    assert model.head.weight.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(step(model, images.to(dtype)), under, strict=True))
