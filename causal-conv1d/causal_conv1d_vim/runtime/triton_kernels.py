"""What the Triton kernels of all operators share."""

import triton
import triton.language as tl


@triton.jit
def probe(out, SIZE: tl.constexpr):
    """Ones: shows that kernels can be built and launched."""
    tl.store(out + tl.arange(0, SIZE), tl.full((SIZE,), 1.0, tl.float32))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a relative error near float32's rounding: log1p(e) = e log(w) / (w - 1) with w = 1 + e."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, e * tl.log(w) / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.maximum(x, 0.0) + log1p
