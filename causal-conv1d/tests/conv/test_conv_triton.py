"""The Triton convolution in Triton's interpreter (or on a GPU), against the reference in float64."""

import functools

import pytest
import torch
from causal_conv1d_vim.conv import reference
from causal_conv1d_vim.conv import triton as backend
from causal_conv1d_vim.conv.reference import ConvGradients
from causal_conv1d_vim.runtime import triton as triton_runtime
from closeness import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_runtime.interpreting(), reason="test_triton_suite.py runs this under the interpreter"
)


def numbers(seed=0):
    """`torch.randn` on the device with a generator of its own."""
    return functools.partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


# Float32 sums of at most a few hundred terms: 4e-6 in the norm; a narrow dtype adds the rounding of the results.
# Triton's interpreter cuts the last bits of a bfloat16 off instead, which errs by up to twice as much.
BFLOAT16 = 2**-7 if triton_runtime.interpreting() else 2**-8
LIMITS = {torch.float32: 4e-6, torch.bfloat16: BFLOAT16 + 4e-6, torch.float16: 2**-11 + 4e-6}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "width", "dtype", "silu", "full"),
    [
        ((2, 19, 20), 4, torch.float32, True, True),
        ((1, 2, 7), 4, torch.float32, True, True),  # shorter than the window
        ((1, 9, 130), 3, torch.bfloat16, True, True),  # two blocks of channels
        ((1, 16, 8), 4, torch.float32, False, False),
        pytest.param((1, 9, 5), 2, torch.float16, False, True, marks=pytest.mark.slow),
    ],
)
def test_matches_reference(shape, width, dtype, silu, full, reverse):
    randn = numbers()
    batch, seqlen, dim = shape
    x = randn(batch, seqlen, 2 * dim).to(dtype)[..., dim:]  # a column slice, as in xz
    weight = randn(dim, width)
    bias = randn(dim) if full else None
    state = randn(batch, width - 1, dim).to(dtype) if full else None
    dout = randn(shape).to(dtype)
    flags = {"silu": silu, "reverse": reverse}
    args = (x, weight, bias, state)
    wide = [None if t is None else t.double() for t in args]
    out = backend.forward(*args, **flags)
    assert out.dtype == dtype
    assert_close(out, reference.forward(*wide, **flags), LIMITS[dtype], in_norm=True)
    grads = backend.backward(dout, *args, **flags)
    for grad, want, source in zip(grads, reference.backward(dout.double(), *wide, **flags), args, strict=True):
        if source is None:
            assert grad is None
        else:
            assert grad.dtype == source.dtype
            assert_close(grad, want, LIMITS[source.dtype], in_norm=True)
    again = backend.backward(dout, *args, **flags)
    assert all(a is b or torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_gradient_is_added_where_asked():
    randn = numbers()
    x, weight, onto = randn(1, 6, 4), randn(4, 4), randn(1, 6, 4)
    flags = {"silu": True, "reverse": True}
    alone = backend.backward(x, x, weight, None, None, **flags)[0]
    added = backend.backward(x, x, weight, None, None, **flags, out=ConvGradients(x=onto.clone()), accumulate=True).x
    torch.testing.assert_close(added, onto + alone, rtol=1e-6, atol=1e-6)


def test_refuses_wide_windows():
    with pytest.raises(ValueError, match="width is 9"):
        backend.forward(torch.ones(1, 2, 3, device=DEVICE), torch.ones(3, 9), None, None, silu=False, reverse=False)
