// Arithmetic of the CUDA kernels: inline for the device and for the host, so that CPU tests cover it. The vectors of the CPU
// kernels have theirs in simd_math.h.
#pragma once

#include <cmath>

#include "common/launch.h"

namespace vim {

constexpr float kLog2E = 1.4426950408889634f;

// 2^x. On the device the special function unit: relative error 2^-22, tiny results flushed to zero.
VIM_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

VIM_HD float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x); the exponential is bounded so that no infinity reaches the reciprocal.
VIM_HD float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(fminf(-x * kLog2E, 126.0f))); }

VIM_HD float silu(float x) { return x * sigmoid(x); }

// d silu(x) / dx, given s = sigmoid(x).
VIM_HD float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). log1p(e) / e is a polynomial on [0, 1] with relative error 3e-8 (weighted
// minimax fit), which keeps small steps accurate (log(1 + e) would lose them to the rounding of 1 + e) and needs one
// special function instead of two.
VIM_HD float softplus(float x) {
  float e = exp2_fast(-fabsf(x) * kLog2E);
  float p = 5.232668987e-03f;
  p = fmaf(p, e, -2.950513749e-02f);
  p = fmaf(p, e, 7.822578694e-02f);
  p = fmaf(p, e, -1.366323180e-01f);
  p = fmaf(p, e, 1.910600018e-01f);
  p = fmaf(p, e, -2.484298053e-01f);
  p = fmaf(p, e, 3.331909660e-01f);
  p = fmaf(p, e, -4.999949313e-01f);
  p = fmaf(p, e, 9.999999699e-01f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

// One state of the recurrence (Mamba eq. 2): h <- 2^(dt A log2 e) h + (dt u) B. `log2_decay` is A log2 e.
VIM_HD float advance(float state, float dt, float log2_decay, float dtu, float b) {
  return fmaf(exp2_fast(dt * log2_decay), state, dtu * b);
}

}  // namespace vim
