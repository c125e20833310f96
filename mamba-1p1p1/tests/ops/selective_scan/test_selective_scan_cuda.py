"""The CUDA scan's kernels, run on the CPU through the tests' emulation of CUDA, against the reference."""

import pytest
import torch
from closeness import assert_close
from cuda_testing import MAMBA_SOURCES, emulate, spills
from mamba_ssm_vim.ops.selective_scan import cuda, reference

# Bytes per thread that the compiler may keep in local memory. The backward scan's registers are bounded so that two
# blocks share a multiprocessor; what gives way is used once per tile of 16 tokens.
SPILL_LIMIT = {
    "scan_forward.cu": 0,
    "scan_stream.cu": 0,
    "scan_backward.cu": 48,
    "scan_backward_finish.cu": 0,
    "mixer_weights.cu": 0,
}


# Relative to the largest entry: float32 sums of up to a few hundred terms in another order, and one rounding of the
# result to its dtype (2^-9, 2^-12).
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The backend module, its library compiled for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        emulate(cuda.library, MAMBA_SOURCES, tmp_path_factory.mktemp("cuda"), patch)
        yield cuda


def inputs(batch, seqlen, dim, dstate, groups, dtype, *, plain=False):
    """Column slices of wider tensors, as the mixer passes them; `plain` leaves out what may be None."""
    torch.manual_seed(0)
    u, delta, z = torch.randn(batch, seqlen, 3 * dim).to(dtype).split(dim, -1)
    rows = torch.randn(batch, seqlen, 12 + 2 * groups * dstate).to(dtype)
    B, C = rows[..., 12:].unflatten(-1, (2, groups, dstate)).unbind(2)
    A = -torch.rand(dim, dstate) * 4 - 0.1
    if plain:
        return [u, delta, A, B, C, None, None, None, None]
    return [u, delta, A, B, C, torch.randn(dim), z, torch.randn(dim), torch.randn(batch, dim, dstate)]


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


CASES = [
    # batch, seqlen, dim, dstate, groups, dtype, reverse
    (2, 37, 70, 16, 1, torch.float32, False),  # two blocks of channels, a partial tile
    (2, 37, 70, 16, 1, torch.float32, True),
    (1, 5, 3, 8, 1, torch.float32, True),  # fewer tokens than a tile, fewer states than a thread's
    (2, 33, 24, 16, 2, torch.bfloat16, True),
    (1, 32, 9, 5, 1, torch.float16, False),
    (2, 37, 64, 16, 1, torch.float32, True),  # channels in multiples of 32: tiles by asynchronous copies
    (1, 51, 32, 16, 1, torch.bfloat16, False),
    (1, 33, 64, 16, 2, torch.float16, True),
    (1, 40, 20, 24, 1, torch.float32, False),  # a channel over two lanes forward, eight backward
    (1, 20, 20, 64, 1, torch.float32, True),  # four lanes, sixteen
]


@pytest.mark.parametrize(("batch", "seqlen", "dim", "dstate", "groups", "dtype", "reverse"), CASES)
def test_matches_reference(emulated, batch, seqlen, dim, dstate, groups, dtype, reverse):
    tensors = inputs(batch, seqlen, dim, dstate, groups, dtype)
    flags = {"delta_softplus": True, "reverse": reverse, "out_scale": 0.5}
    onto = torch.randn(batch, seqlen, dim).to(dtype)
    expected, expected_last, _ = reference.forward(*wide(tensors), **flags, out=onto.double(), accumulate=True)
    out, last, saved = emulated.forward(*tensors, **flags, out=onto, accumulate=True, save=True)
    assert out is onto
    assert_close(out, expected, LIMIT[out.dtype])
    assert_close(last, expected_last, LIMIT[last.dtype])
    dout, dlast = torch.randn(batch, seqlen, dim).to(dtype), torch.randn(batch, dim, dstate)
    grads = emulated.backward(dout, dlast, *tensors, saved, **flags)
    exact = reference.backward(*wide([dout, dlast, *tensors]), [], **flags)
    for name, gradient in grads._asdict().items():
        # The gate's gradient starts from the ungated sum, which the forward scan rounds.
        assert_close(gradient, getattr(exact, name), LIMIT[gradient.dtype] * (2 if name == "z" else 1))


@pytest.mark.parametrize("reverse", [False, True])
def test_without_optional_inputs(emulated, reverse):
    tensors = inputs(1, 19, 6, 16, 1, torch.float32, plain=True)
    flags = {"delta_softplus": False, "reverse": reverse}
    tensors[1] = tensors[1].abs()  # without softplus the step itself must be positive for the state to decay
    out, last, saved = emulated.forward(*tensors, **flags, save=True)
    expected, expected_last, _ = reference.forward(*wide(tensors), **flags)
    assert_close(out, expected, LIMIT[out.dtype])
    assert_close(last, expected_last, LIMIT[last.dtype])
    grads = emulated.backward(out, None, *tensors, saved, **flags)
    exact = reference.backward(out.double(), None, *wide(tensors), [], **flags)
    assert [g is None for g in grads] == [g is None for g in exact]
    for actual, expected in zip(grads, exact, strict=True):
        if actual is not None:
            assert_close(actual, expected, LIMIT[actual.dtype])


@pytest.mark.parametrize("dim", [20, 32])
@pytest.mark.parametrize("reverse", [False, True])
def test_long_sequences_are_cut_in_time(emulated, reverse, dim, monkeypatch):
    tensors = inputs(1, 100, dim, 16, 1, torch.float32)
    flags = {"delta_softplus": True, "reverse": reverse}
    expected, expected_last, _ = reference.forward(*wide(tensors), **flags)
    whole = emulated.forward(*tensors, **flags, save=True)
    monkeypatch.setattr(emulated, "chunk_tiles", lambda *sizes: 2)
    monkeypatch.setattr(emulated, "backward_chunk_tiles", lambda *sizes: 3)
    out, last, saved = emulated.forward(*tensors, **flags, save=True)
    assert_close(out, expected, LIMIT[out.dtype])
    assert_close(last, expected_last, LIMIT[last.dtype])
    assert_close(saved[0], whole[2][0], LIMIT[saved[0].dtype])
    dout, dlast = torch.randn(1, 100, dim), torch.randn(1, dim, 16)
    exact = reference.backward(*wide([dout, dlast, *tensors]), [], **flags)
    for gradient, expected in zip(emulated.backward(dout, dlast, *tensors, saved, **flags), exact, strict=True):
        assert_close(gradient, expected, LIMIT[gradient.dtype])


def test_both_directions_in_one_launch(emulated):
    check_two_directions(emulated, seqlen=37, dim=10, dtype=torch.float32, cut=0)
    check_two_directions(emulated, seqlen=70, dim=9, dtype=torch.float32, cut=0)  # an odd number of tiles
    check_two_directions(emulated, seqlen=16, dim=259, dtype=torch.float32, cut=0)  # 17 blocks of one channel a lane
    check_two_directions(emulated, seqlen=100, dim=6, dtype=torch.float32, cut=3)
    check_two_directions(emulated, seqlen=50, dim=6, dtype=torch.bfloat16, cut=0)


def test_both_directions_by_asynchronous_copies(emulated):
    check_two_directions(emulated, seqlen=37, dim=32, dtype=torch.float32, cut=0)
    check_two_directions(emulated, seqlen=70, dim=64, dtype=torch.bfloat16, cut=0)
    check_two_directions(emulated, seqlen=100, dim=32, dtype=torch.float16, cut=3)


def check_two_directions(module, *, seqlen, dim, dtype, cut):
    ahead = inputs(2, seqlen, dim, 16, 1, dtype)
    back = [None if t is None else t.roll(1, 0) for t in ahead]
    for direction in (ahead, back):
        direction[8] = None
    z = ahead[6]
    out = torch.full((2, seqlen, dim), float("nan")).to(dtype)
    names = ("u", "delta", "A", "B", "C", "D", None, "delta_bias", "initial_state")
    directions = [
        {n: t for n, t in zip(names, direction, strict=True) if n} | {"last_state": None, "reverse": reverse}
        for direction, reverse in ((ahead, False), (back, True))
    ]
    flags = {"delta_softplus": True, "scale": 0.5, "cut": cut}
    saved = module.launch_forward(directions, z, out, save=True, **flags)
    dout, dz = torch.randn(2, seqlen, dim).to(dtype), torch.full((2, seqlen, dim), float("nan")).to(dtype)
    grads = [gradients_of(direction) for direction in (ahead, back)]
    module.launch_backward(directions, grads, z, dout, dz, saved, **flags)
    expected, exact_dz = 0, 0
    for direction, reverse, found in ((ahead, False, grads[0]), (back, True, grads[1])):
        direction[6] = z
        flags = {"delta_softplus": True, "reverse": reverse, "out_scale": 0.5}
        expected = expected + reference.forward(*wide(direction), **flags)[0]
        exact = reference.backward(*wide([dout, None, *direction]), [], **flags)
        exact_dz = exact_dz + exact.z
        for name, gradient in found._asdict().items():
            if gradient is not None:
                assert_close(gradient, getattr(exact, name), LIMIT[gradient.dtype])
    # The first direction is rounded on its way through memory, the ungated sum once more for the gate's gradient.
    assert_close(out, expected, 2 * LIMIT[dtype])
    assert_close(dz, exact_dz, 3 * LIMIT[dtype])


def gradients_of(direction) -> reference.ScanGradients:
    """Where a direction's gradients go, filled with NaN: B's and C's as column slices."""
    u, delta, A, B, C, D, _, bias, _ = (None if t is None else torch.full(t.shape, float("nan")) for t in direction)
    dtype = direction[0].dtype
    dB, dC = torch.cat([B, C, B], -1).to(dtype)[..., : 2 * A.shape[1]].split(A.shape[1], -1)
    return reference.ScanGradients(u=u.to(dtype), delta=delta.to(dtype), A=A, B=dB, C=dC, D=D, delta_bias=bias)


def test_thread_order_does_not_matter(emulated, monkeypatch):
    tensors = inputs(1, 37, 40, 16, 1, torch.float32)
    flags = {"delta_softplus": True, "reverse": False}
    results = []
    for order in ("0", "1"):
        monkeypatch.setenv("VIM_EMULATE_REVERSED", order)
        out, last, saved = emulated.forward(*tensors, **flags, save=True)
        results.append([out, last, *emulated.backward(out, last, *tensors, saved, **flags)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_mixed_types_run_in_float32(emulated):
    tensors = inputs(1, 18, 4, 16, 1, torch.bfloat16)
    tensors[1] = tensors[1].float() + 1e-3
    out, _, saved = emulated.forward(*tensors, delta_softplus=True, reverse=False, save=True)
    expected, _, _ = reference.forward(*wide(tensors), delta_softplus=True, reverse=False)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, LIMIT[out.dtype])
    grads = emulated.backward(out, None, *tensors, saved, delta_softplus=True, reverse=False)
    assert [g.dtype for g in grads[:2]] == [torch.bfloat16, torch.float32]


def test_launch_arithmetic(emulated):
    query = emulated.library.query
    # 384 channels in blocks of 16, or of 32 with two channels a lane; a block lies within one group.
    assert query("vim_scan_forward_blocks", 384, 1, 1) == 24
    assert query("vim_scan_forward_blocks", 384, 1, 2) == 12
    assert query("vim_scan_forward_blocks", 72, 2, 2) == 4
    # A block of sm_80, sm_90 and sm_100 gets at most 163, 227 and 227 KiB of shared memory.
    assert all(query("vim_scan_backward_shared_bytes", n) <= 163 * 1024 for n in (4, 16, 32, 64))
    # Sizes past 2^31 floats are counted in 64 bits: 256 x 6085 tokens (381 tiles), 1536 channels, 16 states.
    assert query("vim_scan_boundary_floats", 256, 6085, 1536, 16) == 256 * 381 * 1536 * 16
    for sizes in ((256, 6085, 1536, 16), (3, 16, 7, 1), (1, 17, 33, 17), (2, 1, 64, 64)):
        assert cuda.boundary_floats(*sizes) == query("vim_scan_boundary_floats", *sizes)
    bc = 32 * 256 * 6085 * 32  # 32 blocks of 48 channels
    direction = bc + 256 * 1536 * (16 + 2)
    assert query("vim_scan_backward_workspace", 256, 6085, 1536, 16, 1, 2, 0) == 2 * direction
    # Two chunks of time: an adjoint state and a sum of steps for each, and partial sums of the parameters.
    assert query("vim_scan_backward_workspace", 256, 6085, 1536, 16, 1, 1, 200) == direction + 256 * 1536 * (
        2 * 17 + 18
    )
    assert query("vim_scan_backward_blocks", 384, 16, 1) == 8


def test_cutting_in_time_is_for_idle_chips():
    assert cuda.chunk_tiles(128 * 12 * 2, 197, 132) == 0  # Vim-Ti at 224 pixels, batch 128: the chip is full
    assert cuda.chunk_tiles(12 * 2, 197, 132) == 0  # too short to share out
    assert cuda.chunk_tiles(32 * 12 * 4, 6085, 132) == 0  # 1248 pixels, batch 32, both directions
    tiles = cuda.chunk_tiles(12 * 4, 6085, 132)
    assert 8 <= tiles <= 381 // 4
    # Backward, 8 blocks of channels in both directions: batch 32 fills the chip, 8, 2 and 1 do with 2, 8 and 16 chunks.
    wanted = {32: 0, 8: 191, 2: 48, 1: 24}
    assert {batch: cuda.backward_chunk_tiles(batch * 8 * 2, 6085, 132) for batch in wanted} == wanted
    assert cuda.backward_chunk_tiles(8 * 2, 197, 132) == 0


def test_declines_what_it_cannot_do(monkeypatch):
    u, A = torch.zeros(1, 2, 3), torch.zeros(3, 4)
    B = torch.zeros(1, 2, 1, 4)
    assert "not on a CUDA device" in cuda.why_not(u, A, B, B)
    monkeypatch.setattr(cuda.library, "why_not", lambda x: None)
    assert cuda.why_not(u, A, B, B) is None
    assert "complex" in cuda.why_not(u, A.to(torch.complex64), B, B)
    assert "constant" in cuda.why_not(u, A, A, B)
    assert "128 states" in cuda.why_not(u, torch.zeros(3, 128), B, B)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
@pytest.mark.parametrize("source", MAMBA_SOURCES, ids=lambda source: source.name)
def test_nvcc_compiles_and_spills_little(source, architecture, tmp_path):
    found = spills(source, architecture, tmp_path)
    assert found
    assert max(found) <= SPILL_LIMIT[source.name]
