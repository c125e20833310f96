// Residual add followed by RMSNorm or LayerNorm, one row at a time in cache; the new residual is written in the same pass.

#include "common/runtime.h"
#include "common/simd.h"
#include "norm.h"

namespace {

constexpr int64_t ROWS = 32;  // per task
constexpr int64_t MOST_PARTIALS = 64;  // partial sums of the weight gradient, a number that depends on the rows only

// Row i as floats with whole vectors readable: the tensor itself if it is float32 and the row whole vectors, else a copy.
VIM_INLINE const float *row_of(float *copy, const char *tensor, int64_t dtype, int64_t i, int64_t d) {
  const char *from = tensor + i * d * size_of(dtype);
  if (dtype == kFloat32 && d % LANES == 0)
    return (const float *)from;
  load_row(copy, from, dtype, d);
  return copy;
}

VIM_INLINE void put(char *row, int64_t dtype, int64_t c, int64_t d, vf v) {
  char *to = row + c * size_of(dtype);
  if (c + LANES <= d)
    store_as(to, dtype, v);
  else
    store_part(to, dtype, v, d - c);
}

void forward_task(const void *args, int64_t task, int64_t) {
  const NormArgs &a = *(const NormArgs *)args;
  const int64_t d = a.dim, wide = padded(d), stop = min_of(task * ROWS + ROWS, a.rows);
  float *total = (float *)vim::scratch(0, (size_t)(5 * wide) * 4);
  float *x_copy = total + wide, *residual_copy = x_copy + wide, *weight = residual_copy + wide, *bias = weight + wide;
  load_row(weight, (const char *)a.weight, kFloat32, d);
  if (a.bias)
    load_row(bias, (const char *)a.bias, kFloat32, d);
  else
    memset(bias, 0, (size_t)wide * 4);
  const float inverse = 1.0f / (float)d, eps = (float)a.eps;
  for (int64_t i = task * ROWS; i < stop; ++i) {
    const float *x = row_of(x_copy, a.x, a.x_dtype, i, d);
    const float *residual = a.residual ? row_of(residual_copy, a.residual, a.residual_dtype, i, d) : nullptr;
    char *residual_out = a.residual_out + i * d * size_of(a.residual_out_dtype);
    char *y = a.y + i * d * size_of(a.y_dtype);
    vf sum = {}, squares = {};
    for (int64_t c = 0; c < wide; c += LANES) {
      const vf r = residual ? load(x + c) + load(residual + c) : load(x + c);
      store(total + c, r);
      put(residual_out, a.residual_out_dtype, c, d, r);
      sum += r;
      squares += r * r;
    }
    float mean = 0.0f;
    if (!a.rms) {
      mean = sum_lanes(sum) * inverse;
      for (int64_t c = 0; c < d; ++c)  // the padding stays zero
        total[c] -= mean;
      squares = vf{};
      for (int64_t c = 0; c < wide; c += LANES)
        squares += load(total + c) * load(total + c);
      if (a.mean)
        a.mean[i] = mean;
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum_lanes(squares) * inverse + eps);
    if (a.rstd)
      a.rstd[i] = rstd;
    for (int64_t c = 0; c < wide; c += LANES)
      put(y, a.y_dtype, c, d, load(total + c) * rstd * load(weight + c) + load(bias + c));
  }
}

void forward(const NormArgs *a) { vim::parallel((a->rows + ROWS - 1) / ROWS, a->threads, forward_task, a); }

struct BackwardCall {
  const NormArgs &a;
  int64_t partials, rows;
  float *sums;  // (partials, 2, padded dim)
};

// With x̂ the normalised row and g = dy * weight: dr = rstd (g - mean(g) [LayerNorm only] - x̂ mean(g x̂)) + dresidual.
void backward_task(const void *args, int64_t task, int64_t) {
  const BackwardCall &call = *(const BackwardCall *)args;
  const NormArgs &a = call.a;
  const int64_t d = a.dim, wide = padded(d), stop = min_of((task + 1) * call.rows, a.rows);
  float *g = (float *)vim::scratch(0, (size_t)(4 * wide) * 4);
  float *normed = g + wide, *extra_copy = normed + wide, *weight = extra_copy + wide;
  float *dweight = call.sums + task * 2 * wide, *dbias = dweight + wide;
  memset(dweight, 0, (size_t)(2 * wide) * 4);
  load_row(weight, (const char *)a.weight, kFloat32, d);
  const float inverse = 1.0f / (float)d;
  for (int64_t i = task * call.rows; i < stop; ++i) {
    const float *dy = row_of(g, a.x, a.x_dtype, i, d);
    const float *from = row_of(normed, a.residual_out, a.residual_out_dtype, i, d);
    const float *extra = a.residual ? row_of(extra_copy, a.residual, a.residual_dtype, i, d) : nullptr;
    const float rstd = a.rstd[i], mean = a.rms ? 0.0f : a.mean[i];
    vf along = {}, level = {};
    for (int64_t c = 0; c < wide; c += LANES) {  // beyond d, dy and weight are zero
      const vf dout = load(dy + c), x = (load(from + c) - mean) * rstd;
      store(dweight + c, load(dweight + c) + dout * x);
      store(dbias + c, load(dbias + c) + dout);
      const vf weighted = dout * load(weight + c);
      along += weighted * x;
      level += weighted;
      store(normed + c, x);
      store(g + c, weighted);
    }
    const float projection = sum_lanes(along) * inverse, offset = a.rms ? 0.0f : sum_lanes(level) * inverse;
    char *dx = a.y + i * d * size_of(a.y_dtype);
    for (int64_t c = 0; c < wide; c += LANES) {
      vf r = (load(g + c) - offset - load(normed + c) * projection) * rstd;
      if (extra)
        r += load(extra + c);
      put(dx, a.y_dtype, c, d, r);
      if (a.dresidual)
        put((char *)(a.dresidual + i * d), kFloat32, c, d, r);
    }
  }
}

void backward(const NormArgs *args) {
  const NormArgs &a = *args;
  const int64_t wide = padded(a.dim);
  BackwardCall call{a, 0, 0, nullptr};
  call.rows = max_of(ROWS, (a.rows + MOST_PARTIALS - 1) / MOST_PARTIALS);
  call.partials = (a.rows + call.rows - 1) / call.rows;
  call.sums = (float *)vim::scratch(1, (size_t)((call.partials + 1) * 2 * wide) * 4);
  vim::parallel(call.partials, a.threads, backward_task, &call);
  for (int64_t c = 0; c < a.dim; ++c) {
    float dweight = 0.0f, dbias = 0.0f;
    for (int64_t p = 0; p < call.partials; ++p) {
      dweight += call.sums[p * 2 * wide + c];
      dbias += call.sums[(p * 2 + 1) * wide + c];
    }
    a.dweight[c] = dweight;
    if (a.dbias)
      a.dbias[c] = dbias;
  }
}

}  // namespace

namespace VIM_ISA {
void (*norm_forward)(const NormArgs *) = forward;
void (*norm_backward)(const NormArgs *) = backward;
}  // namespace VIM_ISA
