"""One step of the scan: against the recurrence, the whole scan, and rows of a larger state."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from mamba_ssm_vim import selective_scan_fn, selective_state_update
from mamba_ssm_vim.ops.triton.selective_state_update import selective_state_update_ref

# One rounding of the output and of the state, of sums of order ten: 2^-24, 2^-12 and 2^-9 relative, with room.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make(batch, heads, dim, groups, dstate, dtype=torch.float32, tied=False):
    """state, x, dt, A, B, C, D, z, dt_bias; heads = 0 leaves their dimension out."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    channels = (heads, dim) if heads else (dim,)
    projection = (batch, groups, dstate) if heads else (batch, dstate)
    if tied:  # one step, decay and skip per head, as Mamba-2 has them
        dt = randn(batch, heads, 1).to(dtype).expand(batch, heads, dim)
        A = (-torch.rand(heads, 1, 1, generator=g) - 1).expand(heads, dim, dstate)
        D, bias = randn(heads, 1).expand(heads, dim), (randn(heads, 1) - 4).expand(heads, dim)
    else:
        dt, A = randn(batch, *channels).to(dtype), -torch.rand(*channels, dstate, generator=g) - 1
        D, bias = randn(*channels), randn(*channels) - 4
    state, x, z = randn(batch, *channels, dstate).to(dtype), randn(batch, *channels), randn(batch, *channels)
    return [state, x.to(dtype), dt, A, randn(*projection), randn(*projection), D, z.to(dtype), bias]


def naive(state, x, dt, A, B, C, D, z, dt_bias):
    """Channel by channel in float64: (out, new state)."""
    state, x, dt, A, B, C, D, z, dt_bias = (t.double() for t in (state, x, dt, A, B, C, D, z, dt_bias))
    after, out = torch.empty_like(state), torch.empty_like(x)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        b, *channel = index
        index, channel = tuple(index), tuple(channel)
        group = (b, channel[0] // (x.shape[1] // B.shape[1])) if B.dim() == 3 else (b,)
        step = F.softplus(dt[index] + dt_bias[channel])
        after[index] = torch.exp(step * A[channel]) * state[index] + step * x[index] * B[group]
        y = (after[index] * C[group]).sum() + D[channel] * x[index]
        out[index] = y * z[index] * torch.sigmoid(z[index])
    return out, after


@pytest.mark.parametrize("function", [selective_state_update, selective_state_update_ref])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "dim", "groups", "tied"), [
    (0, 37, 1, False), (4, 5, 1, False), (4, 5, 2, False), (4, 5, 4, True), (2, 16, 1, True),
])  # fmt: skip
def test_step(heads, dim, groups, tied, dtype, function):
    state, *rest = make(2, heads, dim, groups, 6, dtype, tied)
    expected, expected_state = naive(state, *rest)
    out = function(state, *rest, dt_softplus=True)
    assert out.dtype == dtype
    assert out.shape == rest[0].shape
    assert_close(out, expected, TOLERANCE[dtype], floor=1.0)
    assert_close(state, expected_state, TOLERANCE[dtype], floor=1.0)


@pytest.mark.parametrize("function", [selective_state_update, selective_state_update_ref])
def test_steps_are_the_scan(function):
    g = torch.Generator().manual_seed(1)
    u, delta, z = (torch.randn(2, 12, 9, generator=g) for _ in range(3))
    B, C = (torch.randn(2, 4, 9, generator=g) for _ in range(2))
    A, D, bias = -torch.rand(12, 4, generator=g), torch.randn(12, generator=g), torch.randn(12, generator=g)
    expected, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True)
    state = torch.zeros(2, 12, 4)
    steps = [
        function(state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, dt_softplus=True)
        for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, dim=-1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [0, 2])
def test_rows_of_a_larger_state(heads):
    state, x, dt, A, B, C, D, z, bias = make(5, heads, 8, 2, 4)
    before = state.clone()
    picked = [t[:3] for t in (x, dt)] + [A] + [t[:3] for t in (B, C)] + [D, z[:3], bias]
    rows = torch.tensor([3, -1, 0], dtype=torch.int32)
    out = selective_state_update(state, *picked, dt_softplus=True, state_batch_indices=rows)
    own = before[[3, 0]]
    picked = [t[[0, 2]] if k in (0, 1, 3, 4, 6) else t for k, t in enumerate(picked)]
    torch.testing.assert_close(out[[0, 2]], selective_state_update_ref(own, *picked, dt_softplus=True))
    torch.testing.assert_close(state[[3, 0]], own)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])


def test_gradients_reach_everything_but_the_state():
    state, *rest = make(2, 0, 8, 1, 4)
    leaves = [t.requires_grad_() for t in rest]
    clone = [t.detach().double().requires_grad_() for t in rest]
    reference = selective_state_update_ref(state.double(), *clone, dt_softplus=True)
    out = selective_state_update(state, *leaves, dt_softplus=True)
    assert not state.requires_grad
    out.square().sum().backward()
    reference.square().sum().backward()
    for a, e in zip(leaves, clone, strict=True):
        torch.testing.assert_close(a.grad, e.grad.float(), rtol=1e-4, atol=1e-4)


def test_errors():
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    for index, name in enumerate(names):
        tensors = make(2, 4, 8, 2, 4)
        tensors[index] = tensors[index][..., :-1]
        with pytest.raises(ValueError, match="must be" if name == "state" else f"^{name} must"):
            selective_state_update(*tensors)
    tensors = make(2, 0, 8, 1, 4)
    with pytest.raises(ValueError, match="state_batch_indices"):
        selective_state_update(*tensors, state_batch_indices=torch.zeros(3))
