"""The CUDA convolution's kernels, run on the CPU through the tests' emulation of CUDA, against the reference."""

import pytest
import torch
from causal_conv1d_vim.conv import cuda, reference
from causal_conv1d_vim.conv.reference import ConvGradients
from cuda_testing import CONV_SOURCES, emulate, spills


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The backend module, its library compiled for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        emulate(cuda.library, CONV_SOURCES, tmp_path_factory.mktemp("cuda"), patch)
        yield cuda


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # Sums of at most a few hundred float32 terms, in another order: 1e-5 of the tensor's scale. One rounding to the
    # output's type comes on top: 2^-8 relative for bfloat16, 2^-11 for float16.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * 2
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=1e-5 * scale + 1e-7)


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
    close(emulated.forward(x, weight, bias, state, **flags), reference.forward(*wide, **flags), dtype)
    grads = emulated.backward(dout, x, weight, bias, state, **flags)
    for actual, expected in zip(grads, reference.backward(dout.double(), *wide, **flags), strict=True):
        close(actual, expected, actual.dtype)


def test_no_bias_no_state_no_activation(emulated):
    torch.manual_seed(1)
    x, weight = torch.randn(1, 5, 4), torch.randn(4, 4)
    flags = {"silu": False, "reverse": False}
    close(emulated.forward(x, weight, None, None, **flags), reference.forward(x, weight, None, None, **flags), x.dtype)
    grads = emulated.backward(x, x, weight, None, None, **flags)
    assert grads[2] is None
    assert grads[3] is None


def test_gradient_is_added_where_asked(emulated):
    torch.manual_seed(2)
    x, weight, onto = torch.randn(1, 70, 6), torch.randn(6, 4), torch.randn(1, 70, 6)
    flags = {"silu": True, "reverse": True}
    alone = emulated.backward(x, x, weight, None, None, **flags)[0]
    added = emulated.backward(x, x, weight, None, None, **flags, out=ConvGradients(x=onto.clone()), accumulate=True).x
    close(added, onto + alone, x.dtype)


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
def test_both_ways_in_one_launch(emulated, batch, seqlen, dim, width, dtype):
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
        close(out[direction], reference.forward(*wide, **flags), dtype)
        part, dweight, dbias, _ = reference.backward(douts[direction].double(), *wide, **flags)
        total = total + part
        close(dweights[direction], dweight, torch.float32)
        assert (dbiases[direction] is None) == (dbias is None)
        if dbias is not None:
            close(dbiases[direction], dbias, torch.float32)
    close(dx, total, dtype)


def test_both_ways_take_filters_alike(emulated):
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
