// Depthwise causal convolution with SiLU. Token-major: rows of channels are streamed, weights transposed to (W, channels).
// Channel-first: a channel's tokens are a row, and lanes are tokens.

#include "conv_tokens.h"

namespace {

constexpr int64_t CHANNELS = 64;  // per backward task
constexpr int64_t ROWS = 8;  // channels per task, channel-first

struct ForwardCall {
  const ConvArgs &a;
  ConvolveTokens convolve;
  const float *weights;
};

void forward_task(const void *args, int64_t task, int64_t) {
  const ForwardCall &call = *(const ForwardCall *)args;
  const int64_t chunks = (call.a.len + TOKENS - 1) / TOKENS, start = task % chunks * TOKENS;
  float *copies = (float *)vim::scratch(0, (size_t)window_floats(call.a) * 4);
  call.convolve(call.a, call.weights, copies, task / chunks, start, min_of(start + TOKENS, call.a.len));
}

void forward(const ConvArgs *a) {
  float *weights = (float *)vim::scratch(1, (size_t)weight_floats(*a) * 4);
  load_weights(weights, *a, 0, a->dim);
  const ForwardCall call{*a, convolve_for(a->width), weights};
  vim::parallel(a->batch * ((a->len + TOKENS - 1) / TOKENS), a->threads, forward_task, &call);
}

struct BackwardCall {
  const ConvArgs &a;
  int64_t slabs;
  float *items;  // (B, W + 1, E): this batch item's share of the weight and bias gradients
};

// The output's gradient times SiLU's slope at the recomputed convolution is the gradient `g` of the convolution itself;
// token i of it reaches the inputs i - (W - 1) .. i. The last W rows of x and of g are all that is kept.
template <int WIDTH> void backward_task(const void *args, int64_t task, int64_t) {
  const BackwardCall &call = *(const BackwardCall *)args;
  const ConvArgs &a = call.a;
  const int64_t item = task / call.slabs, first = task % call.slabs * CHANNELS;
  const int64_t count = min_of(CHANNELS, a.dim - first), wide = padded(count), w = WIDTH ? WIDTH : a.width;
  float *weights = (float *)vim::scratch(0, (size_t)((4 * w + 5) * wide) * 4);
  float *copies = weights + (w + 1) * wide, *ring_g = copies + w * wide, *sums = ring_g + w * wide,
        *dout_copy = sums + (w + 1) * wide, *dx_copy = dout_copy + wide, *earlier = dx_copy + wide;
  load_weights(weights, a, first, count);
  const float *bias = weights + w * wide;
  memset(ring_g, 0, (size_t)(w * wide) * 4);
  memset(sums, 0, (size_t)((w + 1) * wide) * 4);
  Window window{{}, copies, w, wide};
  for (int64_t i = -(w - 1); i < 0; ++i)
    window.meet(a, item, i, first, count);
  for (int64_t i = 0; i < a.len + w - 1; ++i) {
    float *g = ring_g + i % w * wide;
    const int64_t ahead = memory_token(a, min_of(i + 8, a.len - 1));
    for (int64_t c = 0; c < count; c += 16) {
      __builtin_prefetch(row(a.x, item, ahead, first + c));
      __builtin_prefetch(row(a.out, item, ahead, first + c));
      __builtin_prefetch(row(a.dx, item, ahead, first + c));
    }
    if (i < a.len) {
      window.meet(a, item, i, first, count);
      const float *tap[MAX_WIDTH];
      window.taps(tap, i);
      const char *from = row(a.out, item, memory_token(a, i), first);
      const float *dout = (const float *)from;
      if (a.out.dtype != kFloat32 || count % LANES) {
        load_row(dout_copy, from, a.out.dtype, count);
        dout = dout_copy;
      }
      for (int64_t c = 0; c < wide; c += LANES) {
        vf d = load(dout + c);
        if (a.silu) {
          const vf r = convolve<WIDTH>(tap, weights, bias, wide, c, w), sig = sigmoid(r);
          d *= sig * (1.0f + r * (1.0f - sig));
        }
        store(g + c, d);
#pragma GCC unroll 4
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
    const float *rows_g[MAX_WIDTH];
    for (int64_t k = 0; k < w; ++k)  // output j + w - 1 - k saw input j at tap k
      rows_g[k] = ring_g + (j + 2 * w - 1 - k) % w * wide;
    char *to = j < 0 ? (char *)(a.dinitial + (item * (w - 1) + j + w - 1) * a.dim + first)
                     : row(a.dx, item, memory_token(a, j), first);
    const int64_t dtype = j < 0 ? (int64_t)kFloat32 : a.dx.dtype;
    const bool direct = dtype == kFloat32 && count % LANES == 0, add = j >= 0 && a.accumulate_dx;
    float *dx = direct ? (float *)to : dx_copy;
    const float *before = direct ? dx : earlier;
    if (add && !direct)
      load_row(earlier, to, dtype, count);
    for (int64_t c = 0; c < wide; c += LANES) {
      vf r = add ? load(before + c) : vf{};
#pragma GCC unroll 4
      for (int64_t k = 0; k < w; ++k)
        r += load(weights + k * wide + c) * load(rows_g[k] + c);
      store(dx + c, r);
    }
    if (!direct)
      store_row(to, dtype, dx, count);
  }
  for (int64_t k = 0; k <= w; ++k)
    memcpy(call.items + (item * (w + 1) + k) * a.dim + first, sums + k * wide, (size_t)count * 4);
}

void backward_in_slabs(const ConvArgs &a, int64_t slab, vim::Task task) {
  const int64_t rows = a.width + 1;
  BackwardCall call{a, (a.dim + slab - 1) / slab, nullptr};
  call.items = (float *)vim::scratch(1, (size_t)(max_of(a.batch, 1) * rows * a.dim) * 4);
  if (a.batch == 0)
    memset(call.items, 0, (size_t)(rows * a.dim) * 4);
  vim::parallel(a.batch * call.slabs, a.threads, task, &call);
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

void backward(const ConvArgs *a) {
  const vim::Task task = a->width == 4   ? backward_task<4>
                         : a->width == 3 ? backward_task<3>
                         : a->width == 2 ? backward_task<2>
                                         : backward_task<0>;
  backward_in_slabs(*a, CHANNELS, task);
}

// ---- channel-first: tokens are adjacent, and `*_token_stride` is the distance of channels -------------------------
// A row is extended by the W - 1 inputs before its first token, on its left, or on its right if reversed. Output m is
// the sum over taps k of weight[k] and entry m + offset(k) of the extended row.

VIM_INLINE int64_t offset(const ConvArgs &a, int64_t k) { return a.reverse ? a.width - 1 - k : k; }
VIM_INLINE int64_t row_size(const ConvArgs &a) { return padded(a.len + 2 * MAX_WIDTH) + 2 * LANES; }
// Place in `initial` and `dinitial` of entry j of the extension, counted from the left.
VIM_INLINE int64_t initial_at(const ConvArgs &a, int64_t item, int64_t channel, int64_t j) {
  const int64_t before = a.width - 1;
  return (item * before + (a.reverse ? before - 1 - j : j)) * a.dim + channel;
}

void load_extended(float *extended, const ConvArgs &a, int64_t item, int64_t channel) {
  const int64_t before = a.width - 1, end = a.len + before;
  float *past = a.reverse ? extended + a.len : extended;
  load_row(a.reverse ? extended : extended + before, row(a.x, item, channel, 0), a.x.dtype, a.len);
  for (int64_t j = 0; j < before; ++j)
    past[j] = a.initial ? a.initial[initial_at(a, item, channel, j)] : 0.0f;
  memset(extended + end, 0, (size_t)(row_size(a) - end) * 4);
}

// W is the width, or 0 for any.
template <int W>
VIM_INLINE void convolve_row(float *to, const float *extended, const ConvArgs &a, int64_t channel, bool gate) {
  const int64_t w = W ? W : a.width;
  const vf bias = broadcast(a.bias ? a.bias[channel] : 0.0f);
  const float *tap[W ? W : MAX_WIDTH];
  vf weight[W ? W : MAX_WIDTH];
  for (int64_t k = 0; k < w; ++k) {
    tap[k] = extended + offset(a, k);
    weight[k] = broadcast(a.weight[channel * w + k]);
  }
  for (int64_t j = 0; j < a.len; j += LANES) {
    vf r = bias;
    for (int64_t k = 0; k < w; ++k)
      r += weight[k] * load(tap[k] + j);
    store(to + j, gate ? silu(r) : r);
  }
}

void convolved(float *to, const float *extended, const ConvArgs &a, int64_t channel, bool gate) {
  if (a.width == 4)
    convolve_row<4>(to, extended, a, channel, gate);
  else if (a.width == 3)
    convolve_row<3>(to, extended, a, channel, gate);
  else
    convolve_row<0>(to, extended, a, channel, gate);
}

void forward_rows_task(const void *args, int64_t task, int64_t) {
  const ConvArgs &a = *(const ConvArgs *)args;
  const int64_t slabs = (a.dim + ROWS - 1) / ROWS, item = task / slabs, first = task % slabs * ROWS;
  float *extended = (float *)vim::scratch(0, (size_t)(2 * row_size(a)) * 4), *result = extended + row_size(a);
  for (int64_t c = first; c < min_of(first + ROWS, a.dim); ++c) {
    load_extended(extended, a, item, c);
    convolved(result, extended, a, c, a.silu);
    store_row(row(a.out, item, c, 0), a.out.dtype, result, a.len);
  }
}

void forward_rows(const ConvArgs *a) {
  vim::parallel(a->batch * ((a->dim + ROWS - 1) / ROWS), a->threads, forward_rows_task, a);
}

VIM_INLINE float dot(const float *x, const float *y, int64_t count) {
  vf sum = {};
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES)
    sum += load(x + j) * load(y + j);
  float total = sum_lanes(sum);
  for (; j < count; ++j)  // not a whole vector: what lies beyond the row may be infinite
    total += x[j] * y[j];
  return total;
}

void backward_rows_task(const void *args, int64_t task, int64_t) {
  const BackwardCall &call = *(const BackwardCall *)args;
  const ConvArgs &a = call.a;
  const int64_t item = task / call.slabs, first = task % call.slabs * ROWS, w = a.width, before = w - 1;
  const int64_t size = row_size(a), end = a.len + before;
  float *extended = (float *)vim::scratch(0, (size_t)(4 * size) * 4), *zeros_and_g = extended + size;
  float *dx = zeros_and_g + size, *earlier = dx + size, *g = zeros_and_g + before,
        *tokens = a.reverse ? dx : dx + before;
  for (int64_t c = first; c < min_of(first + ROWS, a.dim); ++c) {
    load_extended(extended, a, item, c);
    load_row(g, row(a.out, item, c, 0), a.out.dtype, a.len);
    if (a.silu) {
      convolved(dx, extended, a, c, false);
      for (int64_t j = 0; j < a.len; j += LANES) {
        const vf r = load(dx + j), sig = sigmoid(r);
        store(g + j, load(g + j) * (sig * (1.0f + r * (1.0f - sig))));
      }
    }
    memset(zeros_and_g, 0, (size_t)before * 4);
    memset(g + a.len, 0, (size_t)(size - before - a.len) * 4);

    float *sums = call.items + item * (w + 1) * a.dim + c;
    for (int64_t k = 0; k < w; ++k)
      sums[k * a.dim] = dot(g, extended + offset(a, k), a.len);
    vf total = {};
    for (int64_t j = 0; j < a.len; j += LANES)  // zeros follow the row
      total += load(g + j);
    sums[w * a.dim] = sum_lanes(total);

    for (int64_t p = 0; p < end; p += LANES) {
      vf r = {};
      for (int64_t k = 0; k < w; ++k)
        r += broadcast(a.weight[c * w + k]) * load(g + p - offset(a, k));
      store(dx + p, r);
    }
    char *to = row(a.dx, item, c, 0);
    if (a.accumulate_dx) {
      load_row(earlier, to, a.dx.dtype, a.len);
      for (int64_t j = 0; j < a.len; ++j)
        tokens[j] += earlier[j];
    }
    store_row(to, a.dx.dtype, tokens, a.len);
    if (a.dinitial)
      for (int64_t j = 0; j < before; ++j)
        a.dinitial[initial_at(a, item, c, j)] = dx[a.reverse ? a.len + j : j];
  }
}

void backward_rows(const ConvArgs *a) { backward_in_slabs(*a, ROWS, backward_rows_task); }

}  // namespace

namespace VIM_ISA {
void (*conv_forward)(const ConvArgs *) = forward;
void (*conv_backward)(const ConvArgs *) = backward;
void (*conv_rows_forward)(const ConvArgs *) = forward_rows;
void (*conv_rows_backward)(const ConvArgs *) = backward_rows;
}  // namespace VIM_ISA
