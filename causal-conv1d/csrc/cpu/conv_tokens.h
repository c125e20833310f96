// The token-major causal convolution of a run of tokens: what the convolution alone and the one with a projection share.
#pragma once

#include "common/runtime.h"
#include "common/simd_math.h"
#include "conv.h"

namespace {

constexpr int64_t MAX_WIDTH = 16;
constexpr int64_t TOKENS = 32;  // per forward task

// weight (W, channels) for channels [first, first + count), zero beyond; then the bias.
void load_weights(float *to, const ConvArgs &a, int64_t first, int64_t count) {
  const int64_t wide = padded(count);
  for (int64_t c = 0; c < wide; ++c) {
    for (int64_t k = 0; k < a.width; ++k)
      to[k * wide + c] = c < count ? a.weight[(first + c) * a.width + k] : 0.0f;
    to[a.width * wide + c] = a.bias && c < count ? a.bias[first + c] : 0.0f;
  }
}

VIM_INLINE int64_t memory_token(const ConvArgs &a, int64_t i) { return a.reverse ? a.len - 1 - i : i; }

// Channels [first, first + count) of token i in scan order, which may lie before the first token, as floats with whole
// vectors readable: the tensor itself if it is float32 and `count` a multiple of LANES, else a copy in `spare`.
const float *input_row(float *spare, const ConvArgs &a, int64_t item, int64_t i, int64_t first, int64_t count) {
  if (i >= 0) {
    const char *from = row(a.x, item, memory_token(a, i), first);
    if (a.x.dtype == kFloat32 && count % LANES == 0)
      return (const float *)from;
    load_row(spare, from, a.x.dtype, count);
  } else if (a.initial) {
    load_row(spare, (const char *)(a.initial + (item * (a.width - 1) + i + a.width - 1) * a.dim + first), kFloat32,
             count);
  } else {
    memset(spare, 0, (size_t)padded(count) * 4);
  }
  return spare;
}

// The last `w` rows met: row i at [i mod w].
struct Window {
  const float *rows[MAX_WIDTH];
  float *copies;
  int64_t w, wide;

  VIM_INLINE void meet(const ConvArgs &a, int64_t item, int64_t i, int64_t first, int64_t count) {
    const int64_t slot = (i + w) % w;
    rows[slot] = input_row(copies + slot * wide, a, item, i, first, count);
  }
  // tap[0] is the oldest of the window that ends in row i.
  VIM_INLINE void taps(const float **tap, int64_t i) const {
    for (int64_t k = 0; k < w; ++k)
      tap[k] = rows[(i + 1 + k) % w];
  }
};

template <int WIDTH> VIM_INLINE vf convolve(const float *const *tap, const float *weights, const float *bias,
                                            int64_t wide, int64_t c, int64_t width) {
  const int64_t w = WIDTH ? WIDTH : width;
  vf r = load(bias + c);
#pragma GCC unroll 4
  for (int64_t k = 0; k < w; ++k)
    r += load(weights + k * wide + c) * load(tap[k] + c);
  return r;
}

// Floats of `convolve_tokens`' scratch memory, and of the weights that all tasks share.
VIM_INLINE int64_t window_floats(const ConvArgs &a) { return a.width * padded(a.dim); }
VIM_INLINE int64_t weight_floats(const ConvArgs &a) { return (a.width + 1) * padded(a.dim); }

// Tokens [start, stop) in scan order of one batch item. WIDTH: the convolution's width if known when compiling, or 0.
template <int WIDTH> void convolve_tokens(const ConvArgs &a, const float *weights, float *copies, int64_t item,
                                          int64_t start, int64_t stop) {
  const int64_t wide = padded(a.dim), w = WIDTH ? WIDTH : a.width;
  const float *bias = weights + w * wide;
  Window window{{}, copies, w, wide};
  for (int64_t i = start - (w - 1); i < start; ++i)
    window.meet(a, item, i, 0, a.dim);
  const int64_t whole = a.dim / LANES * LANES;
  for (int64_t i = start; i < stop; ++i) {
    window.meet(a, item, i, 0, a.dim);
    const float *tap[MAX_WIDTH];
    window.taps(tap, i);
    char *out = row(a.out, item, memory_token(a, i), 0);
    const int64_t ahead = min_of(i + 2, a.len - 1);  // rows lie apart, which hardware prefetchers do not follow
    const char *next = row(a.x, item, memory_token(a, ahead), 0);
    const auto result = [&](int64_t c) __attribute__((always_inline)) {
      __builtin_prefetch(next + c * size_of(a.x.dtype), 0, 3);
      const vf r = convolve<WIDTH>(tap, weights, bias, wide, c, w);
      return a.silu ? silu(r) : r;
    };
    if (a.out.dtype == kFloat32)
      for (int64_t c = 0; c < whole; c += LANES)
        store((float *)out + c, result(c));
    else
      for (int64_t c = 0; c < whole; c += LANES)
        store_as(out + c * 2, a.out.dtype, result(c));
    if (whole < a.dim)
      store_part(out + whole * size_of(a.out.dtype), a.out.dtype, result(whole), a.dim - whole);
  }
}

typedef void (*ConvolveTokens)(const ConvArgs &, const float *, float *, int64_t, int64_t, int64_t);

ConvolveTokens convolve_for(int64_t width) {
  return width == 4   ? convolve_tokens<4>
         : width == 3 ? convolve_tokens<3>
         : width == 2 ? convolve_tokens<2>
                      : convolve_tokens<0>;
}

}  // namespace
