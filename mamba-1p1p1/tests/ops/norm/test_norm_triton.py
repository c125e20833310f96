"""The Triton add+norm in Triton's interpreter (or on a GPU), against the reference in float64."""

import functools

import pytest
import torch
from causal_conv1d_vim.runtime import triton as triton_runtime
from closeness import assert_close
from mamba_ssm_vim.ops.norm import reference
from mamba_ssm_vim.ops.norm import triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_runtime.interpreting(), reason="test_triton_suite.py runs this under the interpreter"
)


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "residual_dtype", "full"),
    [
        ((2, 7, 48), torch.bfloat16, torch.float32, True),
        ((300, 33), torch.float32, torch.float32, True),
        ((5, 16), torch.float16, torch.float16, False),
        ((1, 192), torch.float32, torch.float32, False),
    ],
)
def test_matches_reference(shape, dtype, residual_dtype, full, rms):
    randn = functools.partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    x = randn(shape).to(dtype)
    residual = (randn(shape) + 0.5).to(residual_dtype) if full else None
    weight = randn(shape[-1])
    bias = randn(shape[-1]) if full else None
    flags = {"eps": 1e-5, "rms": rms}
    # Float32 sums of at most a few hundred terms: 4e-6 in the norm; narrow results add their rounding, and Triton's
    # interpreter cuts the last bits of a bfloat16 off instead, which errs by up to twice as much.
    bfloat16 = 2**-7 if triton_runtime.interpreting() else 2**-8
    limits = {torch.float32: 4e-6, torch.bfloat16: bfloat16 + 4e-6, torch.float16: 2**-10}
    y, total, mean, rstd = backend.forward(x, residual, weight, bias, **flags, residual_dtype=residual_dtype)
    wide = [None if t is None else t.double() for t in (x, residual, weight, bias)]
    expected = reference.forward(*wide, **flags, residual_dtype=torch.float64)
    assert (y.dtype, total.dtype) == (dtype, residual_dtype)
    assert_close(y, expected[0], limits[dtype], in_norm=True)
    assert_close(total, expected[1], limits[residual_dtype], in_norm=True)
    assert (mean is None) == rms
    dy = randn(shape).to(dtype)
    dtotal = randn(shape).to(residual_dtype) if full else None
    grads = backend.backward(dy, dtotal, total, weight, bias, mean, rstd, rms=rms, x_dtype=dtype)
    # The reference's own statistics of the same rounded sum, in float64.
    t = total.double()
    centre = None if rms else t.mean(-1)
    inverse = torch.rsqrt((t if rms else t - centre.unsqueeze(-1)).square().mean(-1) + 1e-5)
    wanted = reference.backward(
        dy.double(), None if dtotal is None else dtotal.double(), t, weight.double(),
        None if bias is None else bias.double(), centre, inverse, rms=rms, x_dtype=torch.float64,
    )  # fmt: skip
    tolerance = (limits[dtype], limits[residual_dtype], 4e-6, 4e-6)
    for grad, want, limit in zip(grads, wanted, tolerance, strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            assert_close(grad, want, limit, in_norm=True)
