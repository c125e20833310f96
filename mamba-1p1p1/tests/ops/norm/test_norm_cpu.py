"""The native add + norm against the float64 reference."""

import pytest
import torch
from mamba_ssm_vim.ops.norm import cpu, reference

pytestmark = pytest.mark.skipif(cpu.library.reason is not None, reason=str(cpu.library.reason))

# One rounding to the result's dtype, and float32 roundings of values of order 1 to 10.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("x_dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("shape", "residual", "bias"),
    [((2, 33, 192), True, False), ((70, 5), True, True), ((3, 1, 67), False, True), ((1, 1), False, False)],
)
def test_agrees_with_reference(shape, residual, bias, x_dtype, rms):
    torch.manual_seed(shape[-1])
    x = torch.randn(shape).to(x_dtype)
    r = torch.randn(shape) if residual else None
    weight, b = torch.randn(shape[-1]), torch.randn(shape[-1]) if bias else None
    dy, dresidual_out = torch.randn(shape).to(x_dtype), torch.randn(shape)
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, r, weight, b)]
    y_exact, total_exact = reference.add_norm_ref(*leaves, eps=1e-5, rms=rms)
    y, total, mean, rstd = cpu.forward(x, r, weight, b, eps=1e-5, rms=rms, residual_dtype=torch.float32)
    torch.testing.assert_close(y.double(), y_exact, rtol=TOLERANCE[x_dtype], atol=TOLERANCE[x_dtype])
    torch.testing.assert_close(total.double(), total_exact, rtol=1e-6, atol=1e-6)
    assert (mean is None) == rms
    torch.autograd.backward([y_exact, total_exact], [dy.double(), dresidual_out.double()])
    dx, dresidual, dweight, dbias = cpu.backward(
        dy, dresidual_out, total, weight, b, mean, rstd, rms=rms, x_dtype=x_dtype
    )
    close = {"rtol": TOLERANCE[x_dtype], "atol": TOLERANCE[x_dtype] * 4}
    torch.testing.assert_close(dx.double(), leaves[0].grad, **close)
    assert dresidual.dtype is torch.float32
    torch.testing.assert_close(dresidual.double(), leaves[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dweight.double(), leaves[2].grad, rtol=1e-4, atol=1e-4)
    if bias:
        torch.testing.assert_close(dbias.double(), leaves[3].grad, rtol=1e-4, atol=1e-4)


def test_same_bits_for_any_number_of_threads():
    x, weight, dy = torch.randn(3000, 96), torch.randn(96), torch.randn(3000, 96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, total, mean, rstd = cpu.forward(x, None, weight, None, eps=1e-5, rms=False, residual_dtype=x.dtype)
            grads = cpu.backward(dy, None, total, weight, None, mean, rstd, rms=False, x_dtype=x.dtype)
            results.append([y, mean, rstd, *grads[:3]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
