"""The Triton step of the scan in Triton's interpreter (or on a GPU), against the reference."""

import functools

import pytest
import torch
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.backend import use_backend
from closeness import assert_close
from mamba_ssm_vim.ops.state_update import op, selective_state_update, selective_state_update_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_runtime.interpreting(), reason="test_triton_suite.py runs this under the interpreter"
)
# Float32 sums of at most 16 terms, in another order; one rounding, which the interpreter makes by cutting bits off.
LIMITS = {torch.float32: 4e-6, torch.bfloat16: 2**-7 + 4e-6}


@pytest.mark.parametrize(
    ("channels", "groups", "dstate", "dtype", "full"),
    [
        ((70,), 0, 16, torch.float32, True),  # two blocks, the second in part
        ((4, 5), 2, 6, torch.bfloat16, True),  # heads and groups, states that are no power of two
        ((3,), 0, 1, torch.float32, False),
    ],
)
def test_matches_the_reference(channels, groups, dstate, dtype, full):
    randn = functools.partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    state = randn(2, *channels, dstate)
    x, dt, z = (randn(2, *channels).to(dtype) for _ in range(3))
    A, D, bias = -randn(*channels, dstate).abs(), randn(*channels), randn(*channels)
    B, C = (randn(2, *((groups, dstate) if groups else (dstate,))) for _ in range(2))
    rest = (D, z, bias, True) if full else (None, None, None, False)
    expected_state = state.clone()
    expected = selective_state_update_ref(expected_state, x, dt, A, B, C, *rest)
    with use_backend("triton"), torch.no_grad():
        assert op.backends.fused(state, x, dt, A, B, C, *rest[:3]) is op.backends.module("triton")
        out = selective_state_update(state, x, dt, A, B, C, *rest)
    assert out.dtype == dtype
    assert_close(out, expected, LIMITS[dtype], in_norm=True)
    assert_close(state, expected_state, 4e-6, in_norm=True)
