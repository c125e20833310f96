"""The fused native mixer against the composed float64 reference operators."""

import dataclasses

import pytest
import torch
from causal_conv1d_vim import use_backend
from mamba_ssm_vim.ops.mixer import Direction, cpu, mixer

pytestmark = pytest.mark.skipif(cpu.scan.library.reason is not None, reason=str(cpu.scan.library.reason))

# As for the scan: some tens of float32 roundings through convolution, projections and recurrence, relative to the
# largest entry. bfloat16 rounds the convolved input, x_proj's output and the two partial outputs: 2^-9 each, and
# the gradients of A sum a hundred such terms of either sign: what is left is off by up to some 20 times that.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 0.08}


def make_direction(dim, states, rank, dtype, *, reverse, back=False, generator=None):
    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return Direction(
        conv_weight=normal(dim, 4).to(dtype),
        conv_bias=normal(dim).to(dtype),
        x_proj_weight=(normal(rank + 2 * states, dim) * dim**-0.5).to(dtype),
        dt_proj_weight=(normal(dim, rank) * rank**-0.5).to(dtype),
        dt_bias=normal(dim) - 2,
        A=-torch.rand(dim, states, generator=generator) * 4 - 0.1,
        D=normal(dim),
        reverse=reverse,
        A_back=-torch.rand(dim, states, generator=generator) * 4 - 0.1 if back else None,
    )


def leaves_of(xz, directions, dtype=None):
    """Copies that require gradients, in float64 if `dtype` says so."""

    def leaf(t):
        return t.detach().clone().to(dtype or t.dtype).requires_grad_()

    copies = [
        dataclasses.replace(
            d, **{f.name: leaf(v) for f in dataclasses.fields(d) if isinstance(v := getattr(d, f.name), torch.Tensor)}
        )
        for d in directions
    ]
    return leaf(xz), copies


def tensors_of(directions):
    return {
        f"{i}.{f.name}": v
        for i, d in enumerate(directions)
        for f in dataclasses.fields(d)
        if isinstance(v := getattr(d, f.name), torch.Tensor)
    }


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
@pytest.mark.parametrize(("batch", "seqlen", "dim", "states", "rank"), [(2, 41, 40, 16, 5), (1, 70, 19, 5, 2)])
def test_agrees_with_reference(batch, seqlen, dim, states, rank, kind, dtype):
    generator = torch.Generator().manual_seed(dim)
    xz = torch.randn(batch, seqlen, 2 * dim, generator=generator).to(dtype)
    sizes = (dim, states, rank, dtype)
    directions = [make_direction(*sizes, reverse=False, back=kind == "v1", generator=generator)]
    if kind == "v2":
        directions.append(make_direction(*sizes, reverse=True, generator=generator))
    dout = torch.randn(batch, seqlen, dim, generator=generator).to(dtype)

    results = {}
    for backend, as_dtype in (("cpu", None), ("reference", torch.float64)):
        leaf, copies = leaves_of(xz, directions, as_dtype)
        with use_backend(backend):
            out = mixer(leaf, copies, scale=0.5)
            out.backward(dout.to(out.dtype))
        results[backend] = {"out": out.detach(), "xz": leaf.grad} | {k: v.grad for k, v in tensors_of(copies).items()}
    for name, exact in results["reference"].items():
        ours = results["cpu"][name]
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


def test_inference_equals_training_forward():
    xz = torch.randn(2, 37, 64)
    directions = [make_direction(32, 16, 3, torch.float32, reverse=r) for r in (False, True)]
    kept, saved = cpu.forward(xz, directions, scale=0.5, save=True)
    plain, nothing = cpu.forward(xz, directions, scale=0.5, save=False)
    assert torch.equal(kept, plain)
    assert len(saved) == 4
    assert [(t.shape, t.dtype) for t in saved] == cpu.saved_shapes(xz, directions)
    assert nothing == []


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Direction) if f.name != "reverse"])
def test_wrong_shapes_are_named(name):
    """Kernels get bare addresses: a wrong shape must not reach them."""
    direction = make_direction(16, 4, 3, torch.float32, reverse=False, back=True)
    xz = torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match=f"{name} must be"):
        mixer(xz, [dataclasses.replace(direction, **{name: getattr(direction, name)[:-1]})])
    with pytest.raises(ValueError, match=f"{name} on meta"):
        mixer(xz, [dataclasses.replace(direction, **{name: getattr(direction, name).to("meta")})])
    with pytest.raises(ValueError, match="xz must be"):
        mixer(xz[..., :-1], [direction])


def test_declines_by_any_direction_not_by_the_first_alone():
    xz = torch.randn(1, 5, 32)
    first, second = (make_direction(16, 4, 2, torch.float32, reverse=reverse) for reverse in (False, True))
    assert cpu.why_not(xz, [first, second]) is None
    assert "A is torch.float64" in cpu.why_not(xz, [first, dataclasses.replace(second, A=second.A.double())])
    assert "A_back is torch.float64" in cpu.why_not(xz, [dataclasses.replace(first, A_back=first.A.double())])
    wide = dataclasses.replace(second, conv_weight=torch.randn(16, 17))
    assert "wider than 16" in cpu.why_not(xz, [first, wide])
