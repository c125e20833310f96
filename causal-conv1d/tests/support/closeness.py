"""How far a kernel's result may lie from the exact one."""

import torch


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    limit: float,
    name: str = "result",
    *,
    in_norm: bool = False,
    floor: float = 1e-3,
) -> None:
    """Raise unless the largest error is at most `limit` times the largest entry of `expected`.

    Args:
        actual, expected: of one shape, any dtype; compared in double precision.
        limit: derived where it is given, from roundings and the number of terms.
        name: for the message.
        in_norm: compare Euclidean norms instead of the largest entries.
        floor: counts as the size of `expected` if that is smaller.
    """
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if expected.numel():
        size = torch.linalg.vector_norm if in_norm else lambda t: t.abs().max()
        error = (size(actual - expected) / size(expected).clamp(min=floor)).item()
        assert error <= limit, f"{name} is off by {error:.2e} of its size, more than {limit:.2e}"
