// The token-major convolution and a projection to a few outputs: each run of tokens is projected while it is in the cache.

#include "conv_tokens.h"

namespace {

constexpr int64_t INPUTS =
    128;  // channels of the projection's weight at a time, so that they stay in the first-level cache
constexpr int VECTORS = 3, ROWS = LANES == 16 ? 8 : 4;  // of a block of results in registers

struct Call {
  const ConvProjectArgs &g;
  ConvolveTokens convolve;
  const float *conv_weights, *weight;  // weight (E, wide), zero beyond the outputs
  int64_t wide, chunks, run;  // a task is `run` chunks of TOKENS tokens, counted over all batch items
};

// to (ROWS, VECS vectors) += rows of `from` (ROWS, count) times weight (count, VECS vectors). Meanwhile the next chunk's
// part of x comes from memory: ROWS rows at `ahead`, `stride` bytes apart, count * 4 bytes of each.
template <int VECS> VIM_INLINE void multiply(float *to, const float *const *from, const float *weight, int64_t wide,
                                             int64_t count, const char *ahead, int64_t stride) {
  vf sum[ROWS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v)
      sum[r][v] = load(to + r * wide + v * LANES);
  constexpr int64_t EVERY = 16 / ROWS;  // a row has a cache line for every 16 inputs
  int64_t line = 0, column = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (e % EVERY == 0) {
      __builtin_prefetch(ahead + line * stride + column, 0, 2);
      if (++line == ROWS)
        line = 0, column += 64;
    }
    vf w[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v)
      w[v] = load(weight + e * wide + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vf x = broadcast(from[r][e]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v)
        sum[r][v] += x * w[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v)
      store(to + r * wide + v * LANES, sum[r][v]);
}

void chunk(const Call &call, int64_t index) {
  const ConvProjectArgs &g = call.g;
  const ConvArgs &a = g.conv;
  const int64_t item = index / call.chunks, start = index % call.chunks * TOKENS;
  const int64_t stop = min_of(start + TOKENS, a.len), wide = call.wide;
  float *copies = (float *)vim::scratch(0, (size_t)(window_floats(a) + TOKENS * wide) * 4);
  float *sums = copies + window_floats(a);
  call.convolve(a, call.conv_weights, copies, item, start, stop);

  const float *rows[TOKENS];
  for (int64_t t = 0; t < TOKENS; ++t) {  // beyond the last token: that one again, whose results are not used
    rows[t] = (const float *)row(a.out, item, memory_token(a, min_of(start + t, stop - 1)), 0);
  }
  const int64_t size = size_of(a.x.dtype);
  int64_t next_item = item, next = stop, ahead_stride = (a.reverse ? -1 : 1) * a.x.token_stride * size;
  if (next == a.len && ++next_item < a.batch)
    next = 0;
  next = min_of(next, a.len - 1);
  const char *ahead = row(a.x, min_of(next_item, a.batch - 1), memory_token(a, next), 0);
  memset(sums, 0, (size_t)(TOKENS * wide) * 4);
  for (int64_t first = 0; first < a.dim; first += INPUTS) {
    const int64_t count = min_of(INPUTS, a.dim - first);
    for (int64_t t = 0; t < stop - start; t += ROWS) {
      const float *from[ROWS];
      for (int r = 0; r < ROWS; ++r)
        from[r] = rows[t + r] + first;
      const char *rows_ahead = ahead + t * ahead_stride + first * size;
      for (int64_t o = 0; o < wide; o += VECTORS * LANES) {
        float *to = sums + t * wide + o;
        const float *weight = call.weight + first * wide + o;
        if (wide - o >= 3 * LANES)
          multiply<3>(to, from, weight, wide, count, rows_ahead, ahead_stride);
        else if (wide - o == 2 * LANES)
          multiply<2>(to, from, weight, wide, count, rows_ahead, ahead_stride);
        else
          multiply<1>(to, from, weight, wide, count, rows_ahead, ahead_stride);
      }
    }
  }
  for (int64_t i = start; i < stop; ++i) {
    float *to = g.projected + (item * a.len + memory_token(a, i)) * g.outputs;
    store_row((char *)to, kFloat32, sums + (i - start) * wide, g.outputs);
  }
}

void task(const void *args, int64_t index, int64_t) {
  const Call &call = *(const Call *)args;
  const int64_t stop = min_of((index + 1) * call.run, call.g.conv.batch * call.chunks);
  for (int64_t i = index * call.run; i < stop; ++i)
    chunk(call, i);
}

void project(const ConvProjectArgs *args) {
  const ConvArgs &a = args->conv;
  const int64_t wide = padded(args->outputs), dim = a.dim;
  float *conv_weights = (float *)vim::scratch(1, (size_t)(weight_floats(a) + dim * wide) * 4);
  float *weight = conv_weights + weight_floats(a);
  load_weights(conv_weights, a, 0, dim);
  for (int64_t o = 0; o < wide; o += LANES)
    for (int64_t e = 0; e < dim; e += LANES) {
      if (o + LANES <= args->outputs && e + LANES <= dim) {
        transpose_square(weight + e * wide + o, wide, args->project_weight + o * dim + e, dim);
        continue;
      }
      for (int64_t i = e; i < min_of(e + LANES, dim); ++i)
        for (int64_t k = o; k < o + LANES; ++k)
          weight[i * wide + k] = k < args->outputs ? args->project_weight[k * dim + i] : 0.0f;
    }
  const int64_t chunks = (a.len + TOKENS - 1) / TOKENS, all = a.batch * chunks;
  // Runs long enough to profit from what they fetch ahead, short enough to keep the threads equally busy.
  const int64_t run = max_of(1, min_of(8, all / (4 * a.threads)));
  const Call call{*args, convolve_for(a.width), conv_weights, weight, wide, chunks, run};
  vim::parallel((all + run - 1) / run, a.threads, task, &call);
}

}  // namespace

namespace VIM_ISA {
void (*conv_project)(const ConvProjectArgs *) = project;
}
