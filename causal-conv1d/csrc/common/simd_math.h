// Exponentials of vectors, and what the kernels make of them.
#pragma once

#include "common/simd.h"

namespace {

// Degree-5 minimax polynomials for 2^f with relative error 9.2e-8, exact where f is whole, so that a decay of one stays
// one over any number of steps.

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;
// Largest |x| that `exp2_small` takes.
constexpr float EXP2_RANGE = 125.0f;

#if defined(__AVX512F__)

VIM_INLINE vf exp2_any(vf x) {
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
  vf p = f * 0.0018793178510821476f + 0.008990996698733909f;
  p = p * f + 0.05581867500267025f;
  p = p * f + 0.24015927160536304f;
  p = p * f + 0.6931517388421506f;
  p = p * f + 1.0f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x), saturating; NaN stays NaN
}

// 2^(a b): the hardware scales any range at no extra cost.
constexpr bool EXP2_CHECKED = false;
template <int COUNT> VIM_INLINE void exp2_small(vf *r, const vf *a, const vf *b) {
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    r[i] = exp2_any(a[i] * b[i]);
}

#else

constexpr bool EXP2_CHECKED = true;
constexpr float EXP2_ROUND[] = {0.0013264723893115088f, 0.009671512869550158f, 0.05550733754247103f,
                                0.24022242080363387f,   0.6931469775914956f,   1.0f};

// 2^f for f in [-1/2, 1/2], of COUNT vectors. Each is one chain of dependent operations, so the chains are written side by
// side: processors look ahead over few of them.
template <int COUNT> VIM_INLINE void exp2_poly(vf *r, const vf *f) {
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    r[i] = f[i] * EXP2_ROUND[0] + EXP2_ROUND[1];
#pragma GCC unroll 4
  for (int k = 2; k < 6; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i)
      r[i] = r[i] * f[i] + EXP2_ROUND[k];
}

// 2^(a b) for |a b| <= EXP2_RANGE, of COUNT vectors. The product is never rounded: both uses of it are fused.
template <int COUNT> VIM_INLINE void exp2_small(vf *r, const vf *a, const vf *b) {
  vf t[COUNT], f[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    t[i] = a[i] * b[i] + MAGIC;
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    f[i] = a[i] * b[i] - (t[i] - MAGIC);
  exp2_poly<COUNT>(r, f);
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    r[i] = (vf)((vi)r[i] + ((vi)t[i] << 23));
}

// 2^x for every float: overflows to infinity, below 2^-125 gives zero, NaN stays NaN.
VIM_INLINE vf exp2_any(vf x) {
  vf c = x > 128.5f ? broadcast(128.5f) : x;
  c = c < -EXP2_RANGE ? broadcast(-EXP2_RANGE) : c;
  const vf t = c + MAGIC;
  const vf f = c - (t - MAGIC);
  // 2^(k - 1) * 2, because 2^128 has no exponent field of its own.
  vf r;
  exp2_poly<1>(&r, &f);
  r = (vf)((vi)r + (((vi)t - 1) << 23)) * 2.0f;
  const vf flushed = x < -EXP2_RANGE ? vf{} : r;
  return x == x ? flushed : x;
}

#endif

// 1 / x for x >= 1, NaN and infinity included; with AVX-512 an estimate and one Newton step, since a division blocks its
// unit for as long as twenty multiply-adds. Right to within two units in the last place.
VIM_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)x, r = _mm512_rcp14_ps(v), one = _mm512_set1_ps(1.0f);
  // The estimate of 1 / infinity is 0 and stays: the step would make it NaN.
  const __mmask16 finite = _mm512_cmp_ps_mask(v, _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
  return (vf)_mm512_mask_fmadd_ps(r, finite, _mm512_fnmadd_ps(v, r, one), r);
#else
  return 1.0f / x;
#endif
}

VIM_INLINE vf sigmoid(vf x) { return reciprocal(1.0f + exp2_any(x * -LOG2E)); }
VIM_INLINE vf silu(vf x) { return x * sigmoid(x); }

// log(1 + e^x) = max(x, 0) + log1p(w) with w = e^-|x| in (0, 1], by a polynomial with relative error 3.3e-8 that is exact
// for small w. Its derivative is sigmoid(x), which the same w gives without cancellation.
VIM_INLINE vf softplus(vf x, vf *slope = nullptr) {
  const vf magnitude = (vf)((vi)x & 0x7fffffff);
  const vf w = exp2_any(magnitude * -LOG2E);
  vf p = w * 0.005364826414734125f - 0.03006580099463463f;
  p = p * w + 0.07920455187559128f;
  p = p * w - 0.13753803074359894f;
  p = p * w + 0.1915365606546402f;
  p = p * w - 0.24857163429260254f;
  p = p * w + 0.3332132399082184f;
  p = p * w - 0.49999648332595825f;
  p = p * w + 1.0f;
  if (slope)
    *slope = (x > 0.0f ? broadcast(1.0f) : w) * reciprocal(1.0f + w);
  return (x > 0.0f ? x : vf{}) + w * p;
}

}  // namespace
