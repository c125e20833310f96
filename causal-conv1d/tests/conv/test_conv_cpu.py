"""The native convolution against the float64 reference."""

import os
import subprocess
import sys

import pytest
import torch
from causal_conv1d_vim.conv import cpu, reference
from causal_conv1d_vim.runtime.cpu_library import INSTRUCTION_SETS
from closeness import assert_close

pytestmark = pytest.mark.skipif(cpu.library.reason is not None, reason=str(cpu.library.reason))

# One rounding of the result to its dtype (2^-24, 2^-8, 2^-11 relative), and some float32 roundings of sums of order 1
# to 10; weight gradients add some hundred terms.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width", "silu", "bias", "initial"),
    [
        (2, 37, 48, 4, True, True, False),
        (1, 1, 5, 4, True, False, True),
        (3, 2, 67, 3, False, True, True),
        (1, 70, 130, 2, True, True, True),
        (2, 33, 16, 4, False, False, False),
        (1, 9, 19, 1, True, True, False),
    ],
)
def test_agrees_with_reference(batch, seqlen, dim, width, silu, bias, initial, reverse, dtype):
    torch.manual_seed(seqlen)
    wide = torch.randn(batch, seqlen, 2 * dim + 1).to(dtype)
    x = wide[..., :dim]  # a column slice: token stride is not dim
    weight, dout = torch.randn(dim, width), torch.randn(batch, seqlen, dim).to(dtype)
    b = torch.randn(dim) if bias else None
    state = torch.randn(batch, width - 1, dim) if initial else None
    flags = {"silu": silu, "reverse": reverse}
    exact_in = [None if t is None else t.double() for t in (x, weight, b, state)]
    assert_close(
        cpu.forward(x, weight, b, state, **flags), reference.forward(*exact_in, **flags), TOLERANCE[dtype], floor=1.0
    )
    ours = cpu.backward(dout, x, weight, b, state, **flags)
    exact = reference.backward(dout.double(), *exact_in, **flags)
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and mine.numel():
            assert_close(mine, theirs, TOLERANCE[dtype], floor=1.0)


def test_same_bits_for_any_number_of_threads():
    x, weight, bias = torch.randn(3, 300, 200), torch.randn(200, 4), torch.randn(200)
    dout = torch.randn_like(x)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    cpu.forward(x, weight, bias, None, silu=True, reverse=True),
                    *cpu.backward(dout, x, weight, bias, None, silu=True, reverse=True)[:3],
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_may_be_added_to_a_slice():
    x, weight = torch.randn(2, 40, 32), torch.randn(32, 4)
    dout = torch.randn_like(x)
    both = torch.zeros(2, 40, 64)
    for _ in range(2):
        out = reference.ConvGradients(x=both[..., 32:])
        cpu.backward(dout, x, weight, None, None, silu=True, reverse=False, out=out, accumulate=True)
    alone = cpu.backward(dout, x, weight, None, None, silu=True, reverse=False).x
    torch.testing.assert_close(both[..., 32:], 2 * alone)
    assert not both[..., :32].any()


def test_too_wide_is_refused():
    with pytest.raises(ValueError, match="widths up to 16"):
        cpu.forward(torch.randn(1, 4, 2), torch.randn(2, 17), None, None, silu=False, reverse=False)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width", "silu", "bias", "initial"),
    [
        (2, 37, 48, 4, True, True, False),
        (1, 2, 5, 4, True, False, True),
        (3, 16, 11, 3, False, True, True),
        (1, 70, 9, 2, True, True, True),
        (2, 33, 16, 16, True, False, True),
        (1, 9, 19, 1, True, True, False),
        (2, 800, 3, 4, True, True, True),
    ],
)
def test_channel_first(batch, seqlen, dim, width, silu, bias, initial, reverse, dtype):
    """A transposed view is served along its rows, without a copy, and its results are laid out like it."""
    torch.manual_seed(seqlen)
    wide = torch.randn(batch, 2 * dim + 1, seqlen).to(dtype)
    x = wide[:, :dim].transpose(1, 2)
    weight, dout = torch.randn(dim, width), torch.randn(batch, seqlen, dim).to(dtype)
    b = torch.randn(dim) if bias else None
    state = torch.randn(batch, width - 1, dim) if initial else None
    flags = {"silu": silu, "reverse": reverse}
    out = cpu.forward(x, weight, b, state, **flags)
    assert out.transpose(1, 2).is_contiguous()
    # The same arithmetic in the same order as along channels.
    assert torch.equal(out, cpu.forward(x.contiguous(), weight, b, state, **flags))
    exact = reference.backward(
        dout.double(), *(None if t is None else t.double() for t in (x, weight, b, state)), **flags
    )
    for gradient in (dout, dout.transpose(1, 2).contiguous().transpose(1, 2)):
        ours = cpu.backward(gradient, x, weight, b, state, **flags)
        assert ours[0].transpose(1, 2).is_contiguous()
        for mine, theirs in zip(ours, exact, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and mine.numel():
                assert_close(mine, theirs, TOLERANCE[dtype], floor=1.0)


def test_channel_first_leaks_nothing_non_finite():
    """An infinite initial state reaches the first tokens and no gradient of later ones."""
    x = torch.randn(1, 3, 21).transpose(1, 2)
    weight, state = torch.randn(3, 4), torch.full((1, 3, 3), float("inf"))
    for reverse in (False, True):
        flags = {"silu": True, "reverse": reverse}
        dout = torch.randn(1, 21, 3)
        for a, e in zip(
            cpu.backward(dout, x, weight, None, state, **flags)[:2],
            reference.backward(dout, x, weight, None, state, **flags)[:2],
            strict=True,
        ):
            assert torch.equal(a.isfinite(), e.isfinite())


@pytest.mark.parametrize("channel_first", [False, True])
def test_huge_strides(channel_first):
    """x's batch items lie 2^31 + 64 elements apart, in memory of which few pages are touched."""
    x, weight, dout = torch.randn(2, 5, 16).bfloat16(), torch.randn(16, 4), torch.randn(2, 5, 16).bfloat16()
    if channel_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    apart, flags = 2**31 + 64, {"silu": True, "reverse": True}
    far = torch.empty(apart + 5 * 16, dtype=torch.bfloat16).as_strided((2, 5, 16), (apart, *x.stride()[1:]))
    far.copy_(x)
    assert torch.equal(cpu.forward(far, weight, None, None, **flags), cpu.forward(x, weight, None, None, **flags))
    pairs = zip(
        cpu.backward(dout, far, weight, None, None, **flags)[:2],
        cpu.backward(dout, x, weight, None, None, **flags)[:2],
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS[: INSTRUCTION_SETS.index(cpu.library.instruction_set or "baseline")])
def test_lower_instruction_sets_pass_these_tests(isa):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-m", "not slow", __file__],
        env={**os.environ, "VIM_CPU_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("outputs", [5, 16, 44, 80])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width"), [(2, 45, 37, 4), (1, 1, 16, 3), (3, 197, 96, 4), (1, 70, 150, 2)]
)
def test_projection_in_the_same_pass(batch, seqlen, dim, width, outputs, reverse):
    generator = torch.Generator().manual_seed(seqlen + outputs)
    x = torch.randn(batch, seqlen, 2 * dim, generator=generator)[..., :dim]
    weight, bias = torch.randn(dim, width, generator=generator), torch.randn(dim, generator=generator)
    project = torch.randn(outputs, dim, generator=generator)
    flags = {"silu": True, "reverse": reverse}
    out, projected = cpu.forward_projected(x, weight, bias, project, **flags)
    assert torch.equal(out, cpu.forward(x, weight, bias, None, **flags))
    # A sum of `dim` products in float32: at most `dim` roundings of 2^-24, relative to the sum of their sizes.
    limit = (out.abs() @ project.abs().T).double() * dim * 2.0**-24
    assert ((projected.double() - out.double() @ project.double().T).abs() <= limit).all()


def test_projection_has_the_same_bits_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    x, project = torch.randn(2, 300, 64, generator=generator), torch.randn(44, 64, generator=generator)
    weight = torch.randn(64, 4, generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.forward_projected(x, weight, None, project, silu=True, reverse=True)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
