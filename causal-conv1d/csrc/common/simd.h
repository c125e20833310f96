// Vectors of LANES floats in compiler vector extensions. Every kernel file includes this once per instruction set, with
// VIM_ISA naming the set; everything lies in an unnamed namespace, so that no inline function compiled for one set can
// be merged by the linker with its namesake compiled for another (which is also why no standard C++ header is used).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/tokens.h"

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

using vim::kBFloat16, vim::kFloat16, vim::kFloat32;

VIM_INLINE int64_t size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }
VIM_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
VIM_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Subtracting zero keeps every value, -0 included, so compilers turn this into one broadcast.
VIM_INLINE vf broadcast(float s) { return s - vf{}; }

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
template <int W> VIM_INLINE vf fold(vf a, vf b) { return VIM_SHUFFLE(a, b, VIM_KEEP) + VIM_SHUFFLE(a, b, VIM_SWAP); }

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
  if (dtype == kFloat32)
    return load((const float *)p);
  vh h;
  memcpy(&h, p, sizeof h);
  return dtype == kBFloat16 ? from_bf16(h) : from_f16(h);
}

VIM_INLINE void store_as(char *p, int64_t dtype, vf v) {
  if (dtype == kFloat32) {
    store((float *)p, v);
    return;
  }
  const vh h = dtype == kBFloat16 ? to_bf16(v) : to_f16(v);
  memcpy(p, &h, sizeof h);
}

// Address of a channel of a token.
VIM_INLINE char *row(const Tokens &x, int64_t item, int64_t token, int64_t channel) {
  return x.data + (item * x.batch_stride + token * x.token_stride + channel) * size_of(x.dtype);
}

VIM_INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// `rows` times BLOCK floats, `stride` bytes apart, into consecutive memory; the dtype is looked at once.
template <int64_t DTYPE> VIM_INLINE void load_blocks(float *dst, const char *src, int64_t stride, int64_t rows) {
  for (int64_t t = 0; t < rows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store(dst + t * BLOCK + v * LANES, load_as(src + t * stride + v * LANES * (DTYPE == kFloat32 ? 4 : 2), DTYPE));
}

template <int64_t DTYPE> VIM_INLINE void store_blocks(char *dst, const float *src, int64_t stride, int64_t rows) {
  for (int64_t t = 0; t < rows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store_as(dst + t * stride + v * LANES * (DTYPE == kFloat32 ? 4 : 2), DTYPE, load(src + t * BLOCK + v * LANES));
}

// `count` < LANES values of some dtype, zeros in the other lanes; nothing beyond them is touched.
VIM_INLINE vf load_part(const char *p, int64_t dtype, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = (__mmask16)((1u << count) - 1u);
  if (dtype == kFloat32)
    return (vf)_mm512_maskz_loadu_ps(mask, p);
  const vh h = (vh)_mm256_maskz_loadu_epi16(mask, p);
  return dtype == kBFloat16 ? from_bf16(h) : from_f16(h);
#else
  char last[LANES * 4] = {};
  memcpy(last, p, (size_t)(count * size_of(dtype)));
  return load_as(last, dtype);
#endif
}

VIM_INLINE void store_part(char *p, int64_t dtype, vf v, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = (__mmask16)((1u << count) - 1u);
  if (dtype == kFloat32)
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  else
    _mm256_mask_storeu_epi16(p, mask, (__m256i)(dtype == kBFloat16 ? to_bf16(v) : to_f16(v)));
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
