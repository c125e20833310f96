"""The CUDA convolution's kernels, run on the CPU through the tests' emulation of CUDA, against the reference."""

import pytest
import torch
from causal_conv1d_vim.conv import cuda, reference
from causal_conv1d_vim.conv.reference import ConvGradients
from closeness import assert_close
from cuda_testing import CONV_SOURCES, emulate, spills

# Relative to the largest entry: sums of at most a few hundred float32 terms, in another order, and one rounding of the
# result to its dtype (2^-9, 2^-12).
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The backend module, its library compiled for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        emulate(cuda.library, CONV_SOURCES, tmp_path_factory.mktemp("cuda"), patch)
        yield cuda


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width", "dtype"),
    [
        (2, 67, 10, 4, torch.float32),  # two segments, an odd length
        (1, 2, 7, 4, torch.float32),  # shorter than the window, an odd number of channels
        (2, 130, 258, 3, torch.bfloat16),  # three segments, two blocks of channels
        (1, 33, 6, 2, torch.float16),
    ],
)
def test_matches_reference(emulated, batch, seqlen, dim, width, dtype, reverse):
    torch.manual_seed(0)
    x = torch.randn(batch, seqlen, 2 * dim).to(dtype)[..., dim:]  # a column slice, as in xz
    weight, bias = torch.randn(dim, width), torch.randn(dim)
    state = torch.randn(batch, width - 1, dim).to(dtype)
    dout = torch.randn(batch, seqlen, dim).to(dtype)
    flags = {"silu": True, "reverse": reverse}
    wide = [t.double() for t in (x, weight, bias, state)]
    assert_close(emulated.forward(x, weight, bias, state, **flags), reference.forward(*wide, **flags), LIMIT[dtype])
    grads = emulated.backward(dout, x, weight, bias, state, **flags)
    for actual, expected in zip(grads, reference.backward(dout.double(), *wide, **flags), strict=True):
        assert_close(actual, expected, LIMIT[actual.dtype])


def test_no_bias_no_state_no_activation(emulated):
    torch.manual_seed(1)
    x, weight = torch.randn(1, 5, 4), torch.randn(4, 4)
    flags = {"silu": False, "reverse": False}
    expected = reference.forward(x, weight, None, None, **flags)
    assert_close(emulated.forward(x, weight, None, None, **flags), expected, LIMIT[x.dtype])
    grads = emulated.backward(x, x, weight, None, None, **flags)
    assert grads[2] is None
    assert grads[3] is None


def test_gradient_is_added_where_asked(emulated):
    torch.manual_seed(2)
    x, weight, onto = torch.randn(1, 70, 6), torch.randn(6, 4), torch.randn(1, 70, 6)
    flags = {"silu": True, "reverse": True}
    alone = emulated.backward(x, x, weight, None, None, **flags)[0]
    added = emulated.backward(x, x, weight, None, None, **flags, out=ConvGradients(x=onto.clone()), accumulate=True).x
    assert_close(added, onto + alone, LIMIT[x.dtype])


def test_thread_order_does_not_matter(emulated, monkeypatch):
    torch.manual_seed(3)
    x, weight = torch.randn(2, 70, 6), torch.randn(6, 4)
    flags = {"silu": True, "reverse": False}
    first = emulated.backward(x, x, weight, None, None, **flags)
    monkeypatch.setenv("VIM_EMULATE_REVERSED", "1")
    second = emulated.backward(x, x, weight, None, None, **flags)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width", "dtype"),
    [
        (2, 67, 10, 4, torch.float32),  # three runs forward, two backward
        (1, 2, 7, 4, torch.float32),  # shorter than the window, an odd number of channels
        (2, 130, 258, 3, torch.bfloat16),
        (1, 33, 6, 2, torch.float16),
    ],
)
def test_both_directions_in_one_launch(emulated, batch, seqlen, dim, width, dtype):
    torch.manual_seed(4)
    x = torch.randn(batch, seqlen, 2 * dim).to(dtype)[..., dim:]
    weights, biases = [torch.randn(dim, width) for _ in range(2)], [torch.randn(dim), None]
    douts = [torch.randn(batch, seqlen, dim).to(dtype) for _ in range(2)]
    out = emulated.forward_pair(x, weights, biases)
    dx = torch.full((batch, seqlen, dim), float("nan")).to(dtype)
    dweights, dbiases = emulated.backward_pair(douts, x, weights, biases, dx)
    total = 0
    for direction in range(2):
        flags = {"silu": True, "reverse": direction == 1}
        wide = [None if t is None else t.double() for t in (x, weights[direction], biases[direction], None)]
        assert_close(out[direction], reference.forward(*wide, **flags), LIMIT[dtype])
        part, dweight, dbias, _ = reference.backward(douts[direction].double(), *wide, **flags)
        total = total + part
        assert_close(dweights[direction], dweight, LIMIT[torch.float32])
        assert (dbiases[direction] is None) == (dbias is None)
        if dbias is not None:
            assert_close(dbiases[direction], dbias, LIMIT[torch.float32])
    assert_close(dx, total, LIMIT[dtype])


def test_both_directions_take_filters_alike(emulated):
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="two alike"):
        emulated.forward_pair(x, [torch.zeros(3, 4), torch.zeros(3, 2)], [None, None])


def test_declines_the_cpu_and_wide_windows():
    x = torch.zeros(1, 2, 3)
    assert "not on a CUDA device" in cuda.why_not(x)
    with pytest.raises(ValueError, match="width is 5"):
        cuda._arguments(x, torch.zeros(3, 5), None, None, True, False)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
@pytest.mark.parametrize("source", CONV_SOURCES, ids=lambda source: source.name)
def test_nvcc_compiles_without_spills(source, architecture, tmp_path):
    found = spills(source, architecture, tmp_path)
    assert found
    assert not any(found)
