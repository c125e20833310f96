// Depthwise causal convolution with SiLU, token-major: rows of channels are streamed, weights transposed to (W, channels).

#include "conv.h"
#include "runtime.h"
#include "simd.h"

namespace {

constexpr int64_t MAX_WIDTH = 16;
constexpr int64_t TOKENS = 32;    // per forward task
constexpr int64_t CHANNELS = 64;  // per backward task

VIM_INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

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

// Token i in scan order, which may lie before the first.
void load_input(float *to, const ConvArgs &a, int64_t item, int64_t i, int64_t first, int64_t count) {
  if (i >= 0) {
    const int64_t at = item * a.x_batch_stride + memory_token(a, i) * a.x_token_stride + first;
    load_row(to, a.x + at * size_of(a.x_dtype), a.x_dtype, count);
  } else if (a.initial) {
    load_row(to, (const char *)(a.initial + (item * (a.width - 1) + i + a.width - 1) * a.dim + first), F32, count);
  } else {
    memset(to, 0, (size_t)padded(count) * 4);
  }
}

void forward_task(const void *args, int64_t task, int64_t) {
  const ConvArgs &a = *(const ConvArgs *)args;
  const int64_t chunks = (a.len + TOKENS - 1) / TOKENS, item = task / chunks, start = task % chunks * TOKENS;
  const int64_t stop = min_of(start + TOKENS, a.len), wide = padded(a.dim), w = a.width;
  float *weights = (float *)vim::scratch(0, (size_t)((2 * MAX_WIDTH + 2) * wide) * 4);
  float *ring = weights + (w + 1) * wide, *result = ring + w * wide;
  load_weights(weights, a, 0, a.dim);
  const float *bias = weights + w * wide;
  for (int64_t i = start - (w - 1); i < start; ++i)
    load_input(ring + (i + w) % w * wide, a, item, i, 0, a.dim);
  for (int64_t i = start; i < stop; ++i) {
    load_input(ring + (i + w) % w * wide, a, item, i, 0, a.dim);
    const float *tap[MAX_WIDTH];
    for (int64_t k = 0; k < w; ++k)
      tap[k] = ring + (i + 1 + k) % w * wide;  // k = 0 is the oldest of the window
    for (int64_t c = 0; c < wide; c += LANES) {
      vf r = load(bias + c);
      for (int64_t k = 0; k < w; ++k)
        r += load(weights + k * wide + c) * load(tap[k] + c);
      store(result + c, a.silu ? silu(r) : r);
    }
    const int64_t at = item * a.out_batch_stride + memory_token(a, i) * a.out_token_stride;
    store_row(a.out + at * size_of(a.out_dtype), a.out_dtype, result, a.dim);
  }
}

void forward(const ConvArgs *a) {
  vim::parallel(a->batch * ((a->len + TOKENS - 1) / TOKENS), a->threads, forward_task, a);
}

struct BackwardCall {
  const ConvArgs &a;
  int64_t slabs;
  float *items;  // (B, W + 1, E): this batch item's share of the weight and bias gradients
};

// The output's gradient times SiLU's slope at the recomputed convolution is the gradient `g` of the convolution itself;
// token i of it reaches the inputs i - (W - 1) .. i. A ring of W rows of x and of g is all that is kept.
void backward_task(const void *args, int64_t task, int64_t) {
  const BackwardCall &call = *(const BackwardCall *)args;
  const ConvArgs &a = call.a;
  const int64_t item = task / call.slabs, first = task % call.slabs * CHANNELS;
  const int64_t count = min_of(CHANNELS, a.dim - first), wide = padded(count), w = a.width;
  float *weights = (float *)vim::scratch(0, (size_t)((4 * MAX_WIDTH + 5) * wide) * 4);
  float *ring = weights + (w + 1) * wide, *ring_g = ring + w * wide, *sums = ring_g + w * wide,
        *dx = sums + (w + 1) * wide, *earlier = dx + wide;
  load_weights(weights, a, first, count);
  const float *bias = weights + w * wide;
  memset(ring_g, 0, (size_t)(w * wide) * 4);
  memset(sums, 0, (size_t)((w + 1) * wide) * 4);
  for (int64_t i = -(w - 1); i < 0; ++i)
    load_input(ring + (i + w) % w * wide, a, item, i, first, count);
  for (int64_t i = 0; i < a.len + w - 1; ++i) {
    float *g = ring_g + i % w * wide;
    if (i < a.len) {
      load_input(ring + i % w * wide, a, item, i, first, count);
      const int64_t at = item * a.out_batch_stride + memory_token(a, i) * a.out_token_stride + first;
      load_row(g, a.out + at * size_of(a.out_dtype), a.out_dtype, count);
      const float *tap[MAX_WIDTH];
      for (int64_t k = 0; k < w; ++k)
        tap[k] = ring + (i + 1 + k) % w * wide;
      for (int64_t c = 0; c < wide; c += LANES) {
        vf d = load(g + c);
        if (a.silu) {
          vf r = load(bias + c);
          for (int64_t k = 0; k < w; ++k)
            r += load(weights + k * wide + c) * load(tap[k] + c);
          const vf sig = sigmoid(r);
          d *= sig * (1.0f + r * (1.0f - sig));
          store(g + c, d);
        }
        for (int64_t k = 0; k < w; ++k)
          store(sums + k * wide + c, load(sums + k * wide + c) + d * load(tap[k] + c));
        store(sums + w * wide + c, load(sums + w * wide + c) + d);
      }
    } else {
      memset(g, 0, (size_t)wide * 4);
    }
    const int64_t j = i - (w - 1);  // this input has now met all its outputs
    if (j < 0 && !a.dinitial)
      continue;
    for (int64_t c = 0; c < wide; c += LANES) {
      vf r = {};
      for (int64_t k = 0; k < w; ++k)  // output j + w - 1 - k saw input j at tap k
        r += load(weights + k * wide + c) * load(ring_g + (j + 2 * w - 1 - k) % w * wide + c);
      store(dx + c, r);
    }
    if (j < 0) {
      store_row((char *)(a.dinitial + (item * (w - 1) + j + w - 1) * a.dim + first), F32, dx, count);
      continue;
    }
    const int64_t at = item * a.dx_batch_stride + memory_token(a, j) * a.dx_token_stride + first;
    char *to = a.dx + at * size_of(a.dx_dtype);
    if (a.accumulate_dx) {
      load_row(earlier, to, a.dx_dtype, count);
      for (int64_t c = 0; c < wide; c += LANES)
        store(dx + c, load(dx + c) + load(earlier + c));
    }
    store_row(to, a.dx_dtype, dx, count);
  }
  for (int64_t k = 0; k <= w; ++k)
    memcpy(call.items + (item * (w + 1) + k) * a.dim + first, sums + k * wide, (size_t)count * 4);
}

void backward(const ConvArgs *args) {
  const ConvArgs &a = *args;
  const int64_t rows = a.width + 1;
  BackwardCall call{a, (a.dim + CHANNELS - 1) / CHANNELS, nullptr};
  call.items = (float *)vim::scratch(1, (size_t)(max_of(a.batch, 1) * rows * a.dim) * 4);
  if (a.batch == 0)
    memset(call.items, 0, (size_t)(rows * a.dim) * 4);
  vim::parallel(a.batch * call.slabs, a.threads, backward_task, &call);
  float *total = call.items;
  for (int64_t item = 1; item < a.batch; ++item)
    for (int64_t i = 0; i < rows * a.dim; ++i)
      total[i] += total[item * rows * a.dim + i];
  for (int64_t c = 0; c < a.dim; ++c)
    for (int64_t k = 0; k < a.width; ++k)
      a.dweight[c * a.width + k] = total[k * a.dim + c];
  if (a.dbias)
    memcpy(a.dbias, total + a.width * a.dim, (size_t)a.dim * 4);
}

}  // namespace

namespace VIM_ISA {
void (*conv_forward)(const ConvArgs *) = forward;
void (*conv_backward)(const ConvArgs *) = backward;
}
