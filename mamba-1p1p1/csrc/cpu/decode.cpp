// A language model's step for one token of each sequence of a small batch: all layers and the head in one call.
//
// Nearly all of its time is reading matrices once. Their rows are multiplied with the batch's vectors in place, in runs of
// whole rows, which lie one after another in memory; activations stay in float32 and in the cache.

#include "common/runtime.h"
#include "common/simd_math.h"
#include "decode.h"

namespace {

constexpr int ROWS = 4;       // of a matrix side by side
constexpr int MOST_ITEMS = 4;  // of the batch side by side
constexpr int64_t TASKS_PER_THREAD = 4;

// Lane i of the result is the sum of v[i].
template <int W = 1> VIM_INLINE vf sums_of(vf *v) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 2 * W)
    v[i] = fold<W>(v[i], v[i + W]);
  if constexpr (2 * W < LANES)
    return sums_of<2 * W>(v);
  return v[0];
}

template <int64_t DTYPE> VIM_INLINE vf load_fixed(const char *p) { return load_as(p, DTYPE); }

// out[item][i] = row i of the matrix times x[item], for `count` <= LANES rows from `rows` on and ITEMS items.
template <int64_t DTYPE, int ITEMS>
void multiply_group(float *out, int64_t out_stride, const char *rows, int64_t columns, int64_t count, const float *x,
                    int64_t x_stride) {
  constexpr int64_t SIZE = DTYPE == kFloat32 ? 4 : 2;
  const int64_t row_bytes = columns * SIZE, whole = columns / LANES * LANES;
  vf sums[ITEMS][LANES];
  for (int64_t first = 0; first < LANES; first += ROWS) {
    vf sum[ROWS][ITEMS] = {};
    if (first < count) {
      const char *p[ROWS];
      for (int r = 0; r < ROWS; ++r)
        p[r] = rows + min_of(first + r, count - 1) * row_bytes;
      for (int64_t c = 0; c < whole; c += LANES) {
        vf item[ITEMS];
#pragma GCC unroll 4
        for (int i = 0; i < ITEMS; ++i)
          item[i] = load(x + i * x_stride + c);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          // The rows that follow, wherever they are multiplied.
          __builtin_prefetch(p[r] + c * SIZE + 2 * ROWS * row_bytes, 0, 2);
          const vf w = load_fixed<DTYPE>(p[r] + c * SIZE);
#pragma GCC unroll 4
          for (int i = 0; i < ITEMS; ++i)
            sum[r][i] += w * item[i];
        }
      }
      if (whole < columns)
        for (int r = 0; r < ROWS; ++r) {
          const vf w = load_part(p[r] + whole * SIZE, DTYPE, columns - whole);
          for (int i = 0; i < ITEMS; ++i)
            sum[r][i] += w * load(x + i * x_stride + whole);
        }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < ITEMS; ++i)
        sums[i][first + r] = sum[r][i];
  }
  for (int i = 0; i < ITEMS; ++i) {
    float *to = out + i * out_stride;
    const vf total = sums_of(sums[i]);
    if (count == LANES)
      store(to, total);
    else
      store_part((char *)to, kFloat32, total, count);
  }
}

template <int64_t DTYPE>
void multiply_rows(float *out, int64_t out_stride, const char *rows, int64_t columns, int64_t count, const float *x,
                   int64_t x_stride, int64_t batch) {
  for (int64_t r = 0; r < count; r += LANES) {
    const char *from = rows + r * columns * (DTYPE == kFloat32 ? 4 : 2);
    const int64_t some = min_of(LANES, count - r);
    for (int64_t i = 0; i < batch; i += MOST_ITEMS) {
      float *to = out + i * out_stride + r;
      const float *of = x + i * x_stride;
      switch (min_of(MOST_ITEMS, batch - i)) {
      case 1: multiply_group<DTYPE, 1>(to, out_stride, from, columns, some, of, x_stride); break;
      case 2: multiply_group<DTYPE, 2>(to, out_stride, from, columns, some, of, x_stride); break;
      case 3: multiply_group<DTYPE, 3>(to, out_stride, from, columns, some, of, x_stride); break;
      default: multiply_group<DTYPE, 4>(to, out_stride, from, columns, some, of, x_stride);
      }
    }
  }
}

// (batch, out_stride) = x (batch, x_stride) times `count` rows of a matrix of this dtype, from row `first` on.
void multiply(float *out, int64_t out_stride, const char *matrix, int64_t first, int64_t count, int64_t columns,
              int64_t dtype, const float *x, int64_t x_stride, int64_t batch) {
  const char *rows = matrix + first * columns * size_of(dtype);
  const auto run = dtype == kFloat32 ? multiply_rows<kFloat32>
                   : dtype == kBFloat16 ? multiply_rows<kBFloat16> : multiply_rows<kFloat16>;
  run(out, out_stride, rows, columns, count, x, x_stride, batch);
}

// Memory of a step, in rows per batch item of whole vectors.
struct Step {
  const DecodeArgs &a;
  const DecodeLayer *layer = nullptr;
  int64_t dim, inner, projected, run = 0;  // `run`: rows or channels of a task, a multiple of LANES
  float *residual, *normed, *u, *z, *low, *y;

  explicit Step(const DecodeArgs &args) : a(args) {
    dim = padded(a.dim);
    inner = padded(a.inner);
    projected = padded(a.rank + 2 * a.states) + LANES;
    const int64_t floats = a.batch * (2 * dim + 3 * inner + projected);
    residual = (float *)vim::scratch(1, (size_t)floats * 4);
    memset(residual, 0, (size_t)floats * 4);
    normed = residual + a.batch * dim;
    u = normed + a.batch * dim;
    z = u + a.batch * inner;
    y = z + a.batch * inner;
    low = y + a.batch * inner;
  }

  // Runs the task over `count` rows, cut into runs of whole vectors.
  void over(int64_t count, vim::Task task) {
    const int64_t tasks = a.threads > 1 ? a.threads * TASKS_PER_THREAD : 1;
    run = padded((count + tasks - 1) / tasks);
    vim::parallel((count + run - 1) / run, a.threads, task, this);
  }
};

void normalise(const Step &s, const float *weight, const float *bias) {
  const int64_t d = s.a.dim;
  const float inverse = 1.0f / (float)d;
  for (int64_t i = 0; i < s.a.batch; ++i) {
    const float *x = s.residual + i * s.dim;
    float *to = s.normed + i * s.dim, mean = 0.0f;
    if (!s.a.rms) {
      vf sum = {};
      for (int64_t c = 0; c < s.dim; c += LANES)
        sum += load(x + c);
      mean = sum_lanes(sum) * inverse;
    }
    vf squares = {};
    for (int64_t c = 0; c < s.dim; c += LANES) {
      const vf centred = load(x + c) - mean;
      squares += centred * centred;
    }
    // Each lane beyond d holds a zero, less the mean.
    const float beyond = (float)(s.dim - d) * mean * mean;
    const float rstd = 1.0f / __builtin_sqrtf((sum_lanes(squares) - beyond) * inverse + (float)s.a.eps);
    for (int64_t c = 0; c < d; ++c)
      to[c] = (x[c] - mean) * rstd * weight[c] + (bias ? bias[c] : 0.0f);
  }
}

// in_proj and the convolution of channels [first, first + count).
void project_in(const void *args, int64_t task, int64_t) {
  const Step &s = *(const Step *)args;
  const DecodeArgs &a = s.a;
  const DecodeLayer &p = *s.layer;
  const int64_t first = task * s.run, count = min_of(s.run, a.inner - first), w = a.width;
  multiply(s.u + first, s.inner, p.in_proj, first, count, a.dim, a.dtype, s.normed, s.dim, a.batch);
  multiply(s.z + first, s.inner, p.in_proj, a.inner + first, count, a.dim, a.dtype, s.normed, s.dim, a.batch);
  float *window = (float *)vim::scratch(0, (size_t)padded(s.run * w) * 4);
  for (int64_t i = 0; i < a.batch; ++i) {
    float *u = s.u + i * s.inner + first, *z = s.z + i * s.inner + first;
    if (p.in_bias)
      for (int64_t c = 0; c < count; ++c) {
        u[c] += p.in_bias[first + c];
        z[c] += p.in_bias[a.inner + first + c];
      }
    char *state = p.conv_state + (i * a.inner + first) * w * size_of(p.conv_state_dtype);
    load_row(window, state, p.conv_state_dtype, count * w);
    for (int64_t c = 0; c < count; ++c) {
      const float *weight = p.conv_weight + (first + c) * w;
      float *seen = window + c * w, sum = p.conv_bias ? p.conv_bias[first + c] : 0.0f;
      for (int64_t k = 0; k + 1 < w; ++k)
        seen[k] = seen[k + 1];
      seen[w - 1] = u[c];
      for (int64_t k = 0; k < w; ++k)
        sum += seen[k] * weight[k];
      u[c] = sum;
    }
    store_row(state, p.conv_state_dtype, window, count * w);
    for (int64_t c = 0; c < count; c += LANES)
      store(u + c, silu(load(u + c)));  // zeros beyond the last channel stay zeros
  }
}

void project_low(const void *args, int64_t task, int64_t) {
  const Step &s = *(const Step *)args;
  const int64_t rows = s.a.rank + 2 * s.a.states, first = task * s.run, count = min_of(s.run, rows - first);
  multiply(s.low + first, s.projected, s.layer->x_proj, first, count, s.a.inner, s.a.dtype, s.u, s.inner, s.a.batch);
}

// The scan's step for up to LANES channels of one item: y = (C h + D u) SiLU(z) with h = exp(dt A) h + dt B u.
VIM_INLINE void update(const Step &s, int64_t item, int64_t first, int64_t count, const float *dt_raw) {
  const DecodeArgs &a = s.a;
  const DecodeLayer &p = *s.layer;
  const int64_t n = a.states, whole = n / LANES * LANES;
  const float *B = s.low + item * s.projected + a.rank, *C = B + n;
  const float *u = s.u + item * s.inner + first, *z = s.z + item * s.inner + first;
  float dt[LANES], dtu[LANES];
  const vf step = softplus(load(dt_raw) + load_part((const char *)(p.dt_bias + first), kFloat32, count));
  store(dt, step);
  store(dtu, step * load(u));
  vf sums[LANES] = {};
  for (int64_t c = 0; c < count; ++c) {
    const float *decay = p.log2_decay + (first + c) * n;
    float *h = p.scan_state + (item * a.inner + first + c) * n;
    for (int64_t k = 0; k < whole; k += LANES) {
      const vf after = exp2_any(load(decay + k) * dt[c]) * load(h + k) + load(B + k) * dtu[c];
      store(h + k, after);
      sums[c] += after * load(C + k);
    }
    if (const int64_t rest = n - whole) {
      const auto part = [&](const float *from) { return load_part((const char *)(from + whole), kFloat32, rest); };
      const vf after = exp2_any(part(decay) * dt[c]) * part(h) + part(B) * dtu[c];
      store_part((char *)(h + whole), kFloat32, after, rest);
      sums[c] += after * part(C);
    }
  }
  const vf skip = load_part((const char *)(p.skip + first), kFloat32, count);
  const vf out = (sums_of(sums) + skip * load(u)) * silu(load(z));
  store(s.y + item * s.inner + first, out);
}

void scan(const void *args, int64_t task, int64_t) {
  const Step &s = *(const Step *)args;
  const DecodeArgs &a = s.a;
  const int64_t first = task * s.run, count = min_of(s.run, a.inner - first);
  float *dt = (float *)vim::scratch(0, (size_t)(a.batch * s.run) * 4);
  multiply(dt, s.run, s.layer->dt_proj, first, count, a.rank, a.dtype, s.low, s.projected, a.batch);
  for (int64_t i = 0; i < a.batch; ++i)
    for (int64_t c = 0; c < count; c += LANES)
      update(s, i, first + c, min_of(LANES, count - c), dt + i * s.run + c);
}

void project_out(const void *args, int64_t task, int64_t) {
  const Step &s = *(const Step *)args;
  const DecodeArgs &a = s.a;
  const int64_t first = task * s.run, count = min_of(s.run, a.dim - first);
  float *out = (float *)vim::scratch(0, (size_t)(a.batch * s.run) * 4);
  multiply(out, s.run, s.layer->out_proj, first, count, a.inner, a.dtype, s.y, s.inner, a.batch);
  for (int64_t i = 0; i < a.batch; ++i)
    for (int64_t c = 0; c < count; ++c)
      s.residual[i * s.dim + first + c] += out[i * s.run + c] + (s.layer->out_bias ? s.layer->out_bias[first + c] : 0.0f);
}

void score(const void *args, int64_t task, int64_t) {
  const Step &s = *(const Step *)args;
  const DecodeArgs &a = s.a;
  const int64_t first = task * s.run, count = min_of(s.run, a.vocab - first);
  float *out = (float *)vim::scratch(0, (size_t)(a.batch * s.run) * 4);
  multiply(out, s.run, a.head, first, count, a.dim, a.dtype, s.normed, s.dim, a.batch);
  for (int64_t i = 0; i < a.batch; ++i)
    store_row(a.logits + (i * a.vocab + first) * size_of(a.dtype), a.dtype, out + i * s.run, count);
}

void step(const DecodeArgs *args) {
  const DecodeArgs &a = *args;
  Step s(a);
  for (int64_t i = 0; i < a.batch; ++i)
    load_row(s.residual + i * s.dim, a.embedded + i * a.dim * size_of(a.dtype), a.dtype, a.dim);
  for (int64_t k = 0; k < a.layers; ++k) {
    s.layer = a.layer + k;
    normalise(s, s.layer->norm_weight, s.layer->norm_bias);
    s.over(a.inner, project_in);
    s.over(a.rank + 2 * a.states, project_low);
    s.over(a.inner, scan);
    s.over(a.dim, project_out);
  }
  normalise(s, a.norm_weight, a.norm_bias);
  s.over(a.vocab, score);
}

}  // namespace

namespace VIM_ISA {
void (*decode_step)(const DecodeArgs *) = step;
}
