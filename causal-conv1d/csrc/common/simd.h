// Vectors of LANES floats in compiler vector extensions. Every kernel file includes this once per instruction set, with
// VIM_ISA naming the set; everything lies in an unnamed namespace, so that no inline function compiled for one set can
// be merged by the linker with its namesake compiled for another (which is also why no standard C++ header is used).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define VIM_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Channels that a kernel works on together: one cache line of float32.
constexpr int BLOCK = 16;
constexpr int NV = BLOCK / LANES;

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

VIM_INLINE int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : 2; }
VIM_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
VIM_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Subtracting zero keeps every value, -0 included, so compilers turn this into one broadcast.
VIM_INLINE vf broadcast(float s) { return s - vf{}; }
VIM_INLINE vi broadcast_int(int32_t s) { return s - vi{}; }

VIM_INLINE vf load(const float *p) {
  vf r;
  memcpy(&r, p, sizeof r);
  return r;
}
VIM_INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

VIM_INLINE float sum_lanes(vf v) {
  float lanes[LANES], total = 0;
  store(lanes, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      lanes[i] += lanes[i + width];
  total = lanes[0];
  return total;
}

// Lane i of the result is lane F(i) of a, or of b if F(i) >= LANES. GCC before 12 has its own name for it.
#if defined(__clang__) || __GNUC__ >= 12
#define VIM_SHUFFLE(a, b, F) __builtin_shufflevector(a, b, VIM_ALL(F))
#else
#define VIM_SHUFFLE(a, b, F) __builtin_shuffle(a, b, (vi){VIM_ALL(F)})
#endif
#define VIM_KEEP(i) ((i) & W ? LANES + (i) : (i))
#define VIM_SWAP(i) ((i) & W ? LANES + ((i) ^ W) : ((i) ^ W))
#define VIM_LOW(i) ((i) & W ? LANES + ((i) ^ W) : (i))
#define VIM_HIGH(i) ((i) & W ? LANES + (i) : ((i) ^ W))
#define VIM_4(F, i) F(i), F(i + 1), F(i + 2), F(i + 3)
#if defined(__AVX512F__)
#define VIM_ALL(F) VIM_4(F, 0), VIM_4(F, 4), VIM_4(F, 8), VIM_4(F, 12)
#elif defined(__AVX2__)
#define VIM_ALL(F) VIM_4(F, 0), VIM_4(F, 4)
#else
#define VIM_ALL(F) VIM_4(F, 0)
#endif

// One level of a transposing sum: lanes without bit W get a's pair sums, lanes with it b's.
template <int W> VIM_INLINE vf fold(vf a, vf b) {
  return VIM_SHUFFLE(a, b, VIM_KEEP) + VIM_SHUFFLE(a, b, VIM_SWAP);
}

// Rows and columns of LANES vectors exchanged, level by level: blocks of W rows and W columns off the diagonal change
// places.
template <int W> VIM_INLINE void transpose_levels(vf *v) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & W)) {
      const vf a = v[i], b = v[i + W];
      v[i] = VIM_SHUFFLE(a, b, VIM_LOW);
      v[i + W] = VIM_SHUFFLE(a, b, VIM_HIGH);
    }
  if constexpr (W > 1)
    transpose_levels<W / 2>(v);
}
#undef VIM_KEEP
#undef VIM_SWAP
#undef VIM_LOW
#undef VIM_HIGH
#undef VIM_4
#undef VIM_ALL
#undef VIM_SHUFFLE

// (LANES, LANES) floats, rows `from_stride` apart, into rows `to_stride` apart.
VIM_INLINE void transpose_square(float *to, int64_t to_stride, const float *from, int64_t from_stride) {
  vf v[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    v[i] = load(from + i * from_stride);
  transpose_levels<LANES / 2>(v);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    store(to + i * to_stride, v[i]);
}

template <int W> VIM_INLINE vf fold_all(vf *v) {
  for (int i = 0; i < W; ++i)
    v[i] = fold<W>(v[i], v[i + W]);
  if constexpr (W > 1)
    return fold_all<W / 2>(v);
  else
    return v[0];
}

// dst[i] = sum over lanes of vector i, for `count` vectors one after another in memory.
VIM_INLINE void sum_lanes_of(float *dst, const float *vectors, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    vf v[LANES];
    for (int j = 0; j < LANES; ++j)
      v[j] = load(vectors + (i + j) * LANES);
    store(dst + i, fold_all<LANES / 2>(v));
  }
  for (; i < count; ++i)
    dst[i] = sum_lanes(load(vectors + i * LANES));
}

// ---- exponentials -------------------------------------------------------------------------------------------------
// Degree-5 minimax polynomials for 2^f with relative error 9.2e-8, exact where f is whole, so that a decay of one stays
// one over any number of steps.

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;
// Largest |x| that `exp2_small` takes.
constexpr float EXP2_RANGE = 125.0f;

constexpr float EXP2_ROUND[] = {0.0013264723893115088f, 0.009671512869550158f, 0.05550733754247103f,
                                0.24022242080363387f,   0.6931469775914956f,   1.0f};

VIM_INLINE vf exp2_poly_round(vf f) {  // f in [-1/2, 1/2]
  vf p = broadcast(EXP2_ROUND[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i)
    p = p * f + EXP2_ROUND[i];
  return p;
}

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
// 2^(a b) for |a b| <= EXP2_RANGE, of COUNT vectors. The product is never rounded: both uses of it are fused. Each is one
// chain of ten dependent operations, so the chains are written side by side: processors look ahead over few of them.
template <int COUNT> VIM_INLINE void exp2_small(vf *r, const vf *a, const vf *b) {
  vf t[COUNT], f[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    t[i] = a[i] * b[i] + MAGIC;
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    f[i] = a[i] * b[i] - (t[i] - MAGIC);
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i)
    r[i] = f[i] * EXP2_ROUND[0] + EXP2_ROUND[1];
#pragma GCC unroll 4
  for (int k = 2; k < 6; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i)
      r[i] = r[i] * f[i] + EXP2_ROUND[k];
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
  const vf r = (vf)((vi)exp2_poly_round(f) + (((vi)t - 1) << 23)) * 2.0f;
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

VIM_INLINE vf exp_of(vf x) { return exp2_any(x * LOG2E); }
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

// ---- memory in float32, bfloat16 or float16 -----------------------------------------------------------------------

VIM_INLINE vf from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

VIM_INLINE vh to_bf16(vf v) {
  const vu bits = (vu)v;
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vu chosen = v == v ? rounded : (bits | 0x400000u);  // NaN: quiet, and never rounded into infinity
  return __builtin_convertvector(chosen >> 16, vh);
}

VIM_INLINE vf from_f16(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu wide = __builtin_convertvector(h, vu);
  const vu sign = (wide & 0x8000u) << 16;
  const vu magnitude = (wide & 0x7fffu) << 13;
  // Exponent bias 127 - 15; a multiplication also normalises subnormals. Infinity and NaN keep an all-ones exponent.
  const vu scaled = (vu)((vf)magnitude * 0x1p112f);
  const vu special = magnitude | 0x7f800000u;
  return (vf)((magnitude >= 0x0f800000u ? special : scaled) | sign);
#endif
}

VIM_INLINE vh to_f16(vf v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu bits = (vu)v;
  const vu sign = (bits >> 16) & 0x8000u;
  const vu magnitude = bits & 0x7fffffffu;
  // Normal results: rebias and round to nearest even. Subnormal ones: adding 0.5 makes the adder round them.
  const vu normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  vu r = magnitude < 0x38800000u ? subnormal : normal;
  r = magnitude >= 0x477ff000u ? (vu{} + 0x7c00u) : r;
  r = magnitude > 0x7f800000u ? (vu{} + 0x7e00u) : r;
  return __builtin_convertvector(r | sign, vh);
#endif
}

VIM_INLINE vf load_as(const char *p, int64_t dtype) {
  if (dtype == F32)
    return load((const float *)p);
  vh h;
  memcpy(&h, p, sizeof h);
  return dtype == BF16 ? from_bf16(h) : from_f16(h);
}

VIM_INLINE void store_as(char *p, int64_t dtype, vf v) {
  if (dtype == F32) {
    store((float *)p, v);
    return;
  }
  const vh h = dtype == BF16 ? to_bf16(v) : to_f16(v);
  memcpy(p, &h, sizeof h);
}

// `rows` times BLOCK floats, `stride` bytes apart, into consecutive memory; the dtype is looked at once.
template <int64_t DTYPE> VIM_INLINE void load_blocks(float *dst, const char *src, int64_t stride, int64_t rows) {
  for (int64_t t = 0; t < rows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store(dst + t * BLOCK + v * LANES, load_as(src + t * stride + v * LANES * (DTYPE == F32 ? 4 : 2), DTYPE));
}

template <int64_t DTYPE> VIM_INLINE void store_blocks(char *dst, const float *src, int64_t stride, int64_t rows) {
  for (int64_t t = 0; t < rows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store_as(dst + t * stride + v * LANES * (DTYPE == F32 ? 4 : 2), DTYPE, load(src + t * BLOCK + v * LANES));
}

// `count` < LANES values of some dtype, zeros in the other lanes; nothing beyond them is touched.
VIM_INLINE vf load_part(const char *p, int64_t dtype, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = (__mmask16)((1u << count) - 1u);
  if (dtype == F32)
    return (vf)_mm512_maskz_loadu_ps(mask, p);
  const vh h = (vh)_mm256_maskz_loadu_epi16(mask, p);
  return dtype == BF16 ? from_bf16(h) : from_f16(h);
#else
  char last[LANES * 4] = {};
  memcpy(last, p, (size_t)(count * size_of(dtype)));
  return load_as(last, dtype);
#endif
}

VIM_INLINE void store_part(char *p, int64_t dtype, vf v, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = (__mmask16)((1u << count) - 1u);
  if (dtype == F32)
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  else
    _mm256_mask_storeu_epi16(p, mask, (__m256i)(dtype == BF16 ? to_bf16(v) : to_f16(v)));
#else
  char last[LANES * 4];
  store_as(last, dtype, v);
  memcpy(p, last, (size_t)(count * size_of(dtype)));
#endif
}

// `count` floats (any number) from memory of some dtype; the rest of the last vector of `dst` becomes zero.
VIM_INLINE void load_row(float *dst, const char *src, int64_t dtype, int64_t count) {
  const int64_t size = size_of(dtype);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store(dst + i, load_as(src + i * size, dtype));
  if (i < count)
    store(dst + i, load_part(src + i * size, dtype, count - i));
}

VIM_INLINE void store_row(char *dst, int64_t dtype, const float *src, int64_t count) {
  const int64_t size = size_of(dtype);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store_as(dst + i * size, dtype, load(src + i));
  if (i < count) {
    float rest[LANES] = {};
    for (int64_t k = 0; i + k < count; ++k)
      rest[k] = src[i + k];
    store_part(dst + i * size, dtype, load(rest), count - i);
  }
}

}  // namespace
