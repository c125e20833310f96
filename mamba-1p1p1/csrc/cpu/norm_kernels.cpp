// Residual add followed by RMSNorm or LayerNorm, one row at a time in cache; the new residual is written in the same pass.

#include "norm.h"
#include "runtime.h"
#include "simd.h"

namespace {

constexpr int64_t ROWS = 32;           // per task
constexpr int64_t MOST_PARTIALS = 64;  // partial sums of the weight gradient, a number that depends on the rows only

VIM_INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

void forward_task(const void *args, int64_t task, int64_t) {
  const NormArgs &a = *(const NormArgs *)args;
  const int64_t d = a.dim, wide = padded(d), stop = min_of(task * ROWS + ROWS, a.rows);
  float *total = (float *)vim::scratch(0, (size_t)(4 * wide) * 4);
  float *other = total + wide, *weight = other + wide, *bias = weight + wide;
  load_row(weight, (const char *)a.weight, F32, d);
  if (a.bias)
    load_row(bias, (const char *)a.bias, F32, d);
  else
    memset(bias, 0, (size_t)wide * 4);
  const float inverse = 1.0f / (float)d, eps = (float)a.eps;
  for (int64_t i = task * ROWS; i < stop; ++i) {
    load_row(total, a.x + i * d * size_of(a.x_dtype), a.x_dtype, d);
    if (a.residual) {
      load_row(other, a.residual + i * d * size_of(a.residual_dtype), a.residual_dtype, d);
      for (int64_t c = 0; c < wide; c += LANES)
        store(total + c, load(total + c) + load(other + c));
    }
    store_row(a.residual_out + i * d * size_of(a.residual_out_dtype), a.residual_out_dtype, total, d);
    float mean = 0.0f;
    if (!a.rms) {
      vf sum = {};
      for (int64_t c = 0; c < wide; c += LANES)
        sum += load(total + c);
      mean = sum_lanes(sum) * inverse;
      for (int64_t c = 0; c < d; ++c)  // the padding stays zero
        total[c] -= mean;
      if (a.mean)
        a.mean[i] = mean;
    }
    vf squares = {};
    for (int64_t c = 0; c < wide; c += LANES)
      squares += load(total + c) * load(total + c);
    const float rstd = 1.0f / __builtin_sqrtf(sum_lanes(squares) * inverse + eps);
    if (a.rstd)
      a.rstd[i] = rstd;
    for (int64_t c = 0; c < wide; c += LANES)
      store(total + c, load(total + c) * rstd * load(weight + c) + load(bias + c));
    store_row(a.y + i * d * size_of(a.y_dtype), a.y_dtype, total, d);
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
  float *normed = g + wide, *extra = normed + wide, *weight = extra + wide;
  float *dweight = call.sums + task * 2 * wide, *dbias = dweight + wide;
  memset(dweight, 0, (size_t)(2 * wide) * 4);
  load_row(weight, (const char *)a.weight, F32, d);
  const float inverse = 1.0f / (float)d;
  for (int64_t i = task * call.rows; i < stop; ++i) {
    load_row(g, a.x + i * d * size_of(a.x_dtype), a.x_dtype, d);
    load_row(normed, a.residual_out + i * d * size_of(a.residual_out_dtype), a.residual_out_dtype, d);
    const float rstd = a.rstd[i], mean = a.rms ? 0.0f : a.mean[i];
    vf along = {}, level = {};
    for (int64_t c = 0; c < wide; c += LANES) {  // beyond d, g and weight are zero
      const vf dy = load(g + c), x = (load(normed + c) - mean) * rstd;
      store(dweight + c, load(dweight + c) + dy * x);
      store(dbias + c, load(dbias + c) + dy);
      const vf weighted = dy * load(weight + c);
      along += weighted * x;
      level += weighted;
      store(normed + c, x);
      store(g + c, weighted);
    }
    const float projection = sum_lanes(along) * inverse, offset = a.rms ? 0.0f : sum_lanes(level) * inverse;
    for (int64_t c = 0; c < wide; c += LANES)
      store(g + c, (load(g + c) - offset - load(normed + c) * projection) * rstd);
    if (a.residual) {
      load_row(extra, a.residual + i * d * size_of(a.residual_dtype), a.residual_dtype, d);
      for (int64_t c = 0; c < wide; c += LANES)
        store(g + c, load(g + c) + load(extra + c));
    }
    store_row(a.y + i * d * size_of(a.y_dtype), a.y_dtype, g, d);
    if (a.dresidual)
      store_row((char *)(a.dresidual + i * d), F32, g, d);
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
}
