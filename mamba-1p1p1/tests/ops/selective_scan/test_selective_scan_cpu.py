"""The native selective scan against the float64 reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from causal_conv1d_vim.runtime.cpu_library import INSTRUCTION_SETS
from closeness import assert_close
from mamba_ssm_vim.ops.selective_scan import cpu, reference

pytestmark = pytest.mark.skipif(cpu.library.reason is not None, reason=str(cpu.library.reason))

# Relative to the largest entry: a float32 recurrence over L tokens with decays below one keeps some 10 roundings of
# 2^-24; sums over tokens and channels some hundred. bfloat16 and float16 round once on the way out (2^-9, 2^-12).
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def make(batch, seqlen, dim, states, groups, dtype, constant="", optional=True, initial=False):
    """Inputs as the mixer gives them: u and z are column slices, B and C slices of one projection."""
    generator = torch.Generator().manual_seed(dim * states + seqlen)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    uz = normal(batch, seqlen, 2 * dim + 3).to(dtype)
    bc = normal(batch, seqlen, groups, 2 * states + 1).to(dtype)
    return {
        "u": uz[..., :dim],
        "delta": (normal(batch, seqlen, dim) - 1).to(dtype),
        "A": -torch.rand(dim, states, generator=generator) * 4 - 0.05,
        "B": normal(dim, states) if "B" in constant else bc[..., :states],
        "C": normal(dim, states) if "C" in constant else bc[..., states : 2 * states],
        "D": normal(dim) if optional else None,
        "z": uz[..., dim : 2 * dim] if optional else None,
        "delta_bias": normal(dim) if optional else None,
        "initial_state": normal(batch, dim, states) if initial else None,
    }


CASES = [
    (2, 37, 48, 16, 1, {}),
    (1, 1, 5, 1, 1, {}),
    (2, 65, 40, 3, 2, {"initial": True}),
    (1, 64, 33, 16, 3, {"initial": True, "optional": False}),
    (1, 33, 20, 7, 1, {"constant": "B"}),
    (2, 34, 16, 16, 1, {"constant": "C", "initial": True}),
    (1, 40, 17, 5, 1, {"constant": "BC", "optional": False}),
    (1, 5, 3, 256, 1, {"initial": True}),
    (1, 45, 20, 64, 1, {"initial": True}),
    (2, 35, 36, 27, 2, {}),
    (1, 197, 150, 16, 1, {}),
]


def run_both(inputs, dtype, *, reverse, softplus, scale=1.0):
    flags = {"delta_softplus": softplus, "reverse": reverse, "out_scale": scale}
    args = [inputs[k] for k in NAMES]
    exact_args = [None if t is None else t.double() for t in args]
    out, last, saved = cpu.forward(*args, **flags, save=True)
    exact_out, exact_last, _ = reference.forward(*exact_args, **flags)
    assert_close(out, exact_out, TOLERANCE[dtype], "out")
    assert_close(last, exact_last, TOLERANCE[torch.float32], "last_state")
    dout, dlast = torch.randn(out.shape).to(dtype), torch.randn(last.shape)
    grads = cpu.backward(dout, dlast, *args, saved, **flags)
    exact = reference.backward(dout.double(), dlast.double(), *exact_args, [], **flags)
    for name, mine, theirs in zip(NAMES, grads, exact, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.shape == inputs[name].shape
            assert mine.dtype is (torch.float32 if name in ("A", "D", "delta_bias") else inputs[name].dtype)
            assert_close(mine, theirs, TOLERANCE[mine.dtype], name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "seqlen", "dim", "states", "groups", "kinds"), CASES)
def test_agrees_with_reference(batch, seqlen, dim, states, groups, kinds, reverse):
    inputs = make(batch, seqlen, dim, states, groups, torch.float32, **kinds)
    run_both(inputs, torch.float32, reverse=reverse, softplus=True, scale=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    run_both(make(2, 70, 40, 16, 1, dtype), dtype, reverse=True, softplus=True)


def test_without_softplus():
    inputs = make(2, 40, 24, 16, 1, torch.float32)
    inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs() * 0.2, inputs["delta_bias"].abs() * 0.1
    run_both(inputs, torch.float32, reverse=False, softplus=False)


def test_very_long_steps_reset_the_state():
    """dt A far below -126, where 2^x has left the range of the fast exponential."""
    inputs = make(1, 50, 32, 16, 1, torch.float32)
    inputs["delta"] = inputs["delta"] * 60
    run_both(inputs, torch.float32, reverse=False, softplus=True)


def test_subnormal_states_count_as_zero():
    """Inputs at the smallest normal number decay below it within a few tokens."""
    inputs = make(1, 50, 32, 16, 1, torch.float32)
    inputs["u"] = inputs["u"] * 2.0**-126
    run_both(inputs, torch.float32, reverse=False, softplus=True)


def test_accumulates_into_a_slice_and_scales():
    inputs = make(2, 45, 40, 16, 1, torch.float32)
    args = [inputs[k] for k in NAMES]
    flags = {"delta_softplus": True, "reverse": False}
    alone = cpu.forward(*args, **flags)[0]
    wide = torch.ones(2, 45, 90)
    cpu.forward(*args, **flags, out_scale=0.25, out=wide[..., 7:47], accumulate=True)
    torch.testing.assert_close(wide[..., 7:47], 1 + 0.25 * alone, rtol=1e-6, atol=1e-6)
    assert (wide[..., :7] == 1).all()
    assert (wide[..., 47:] == 1).all()


def test_low_rank_step_inside_the_scan():
    inputs = make(2, 70, 40, 16, 1, torch.float32)
    rank = 5
    low, weight = torch.randn(2, 70, rank), torch.randn(40, rank) * 0.3
    inputs["delta"] = low @ weight.T
    flags = {"delta_softplus": True, "reverse": True}
    args = [inputs[k] for k in NAMES]
    out, _, saved = cpu.forward(*args, **flags, save=True)
    dout = torch.randn_like(out)
    grads = cpu.backward(dout, None, *args, saved, **flags)
    args[1] = low
    fused, _, saved = cpu.forward(*args, **flags, save=True, dt_weight=weight)
    assert_close(fused, out.double(), TOLERANCE[torch.float32], "out")
    du, dz = torch.empty_like(out), torch.empty_like(out)
    dx_dbl = torch.empty(2, 70, rank + 2 * 16)
    dlow, dB, dC = dx_dbl.split([rank, 16, 16], -1)
    found, ddt_weight = cpu.backward_projected(
        dout, *args[:-1], weight, saved, **flags, out_scale=1.0, accumulate=False,
        out=reference.ScanGradients(u=du, delta=dlow, B=dB.unsqueeze(2), C=dC.unsqueeze(2), z=dz),
    )  # fmt: skip
    expected = torch.cat([grads.delta @ weight, grads.B.squeeze(2), grads.C.squeeze(2)], dim=-1)
    assert_close(dx_dbl, expected.double(), TOLERANCE[torch.float32], "dx")
    assert_close(ddt_weight, torch.einsum("ble,blr->er", grads.delta, low).double(), 3e-5, "ddt_weight")
    assert_close(found.u, grads.u.double(), TOLERANCE[torch.float32], "du")


@pytest.mark.parametrize("seqlen", [197, 40])
def test_same_bits_for_any_number_of_threads(seqlen):
    inputs = make(2, seqlen, 200, 16, 1, torch.float32, initial=True)
    args = [inputs[k] for k in NAMES]
    dout = torch.randn(2, seqlen, 200)
    flags = {"delta_softplus": True, "reverse": False}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, last, saved = cpu.forward(*args, **flags, save=True)
            results.append([out, last, *saved, *cpu.backward(dout, None, *args, saved, **flags)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["u", "delta", "z", "B"])
def test_non_finite_inputs_propagate(where, value):
    inputs = make(1, 40, 20, 4, 1, torch.float32)
    inputs["u"], inputs["z"], inputs["B"] = inputs["u"].clone(), inputs["z"].clone(), inputs["B"].clone()
    inputs[where][0, 20, ..., 1] = value
    args = [inputs[k] for k in NAMES]
    flags = {"delta_softplus": True, "reverse": False}
    ours, exact = cpu.forward(*args, **flags)[0], reference.forward(*args, **flags)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty(shape):
    inputs = make(*shape, 4, 1, torch.float32, initial=True)
    args = [inputs[k] for k in NAMES]
    out, last, _ = cpu.forward(*args, delta_softplus=True, reverse=False)
    assert out.shape == shape
    torch.testing.assert_close(last, inputs["initial_state"])


def test_complex_is_declined():
    A = torch.randn(4, 2, dtype=torch.complex64)
    assert "complex" in cpu.why_not(torch.randn(1, 2, 4), A, A, A)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS[: INSTRUCTION_SETS.index(cpu.library.instruction_set or "baseline")])
def test_lower_instruction_sets_pass_these_tests(isa):
    tests = [str(p) for p in Path(__file__).parents[1].glob("*/test_*_cpu.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-k", "reference or half", *tests],
        env={**os.environ, "VIM_CPU_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_huge_strides():
    """u's batch items lie 2^31 + 64 elements apart, in memory of which few pages are touched."""
    inputs = make(2, 5, 16, 4, 1, torch.bfloat16)
    apart = 2**31 + 64
    far = torch.empty(apart + 5 * 16, dtype=torch.bfloat16).as_strided((2, 5, 16), (apart, 16, 1))
    far.copy_(inputs["u"])
    args = [inputs[k] for k in NAMES]
    flags = {"delta_softplus": True, "reverse": True}
    near = cpu.forward(*args, **flags)[0]
    assert torch.equal(cpu.forward(far, *args[1:], **flags)[0], near)
