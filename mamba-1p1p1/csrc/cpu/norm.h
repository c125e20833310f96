// Arguments of the add+norm kernels. Every field is eight bytes wide; norm/cpu.py packs them in this order.
#pragma once

#include <stdint.h>

struct NormArgs {
  int64_t rows, dim, rms, threads;
  double eps;
  const char *x;  // (rows, dim) contiguous; backward: the gradient of y
  int64_t x_dtype;
  const char *residual;  // (rows, dim) or null; backward: the gradient of the new residual, or null
  int64_t residual_dtype;
  char *y;  // backward: dx
  int64_t y_dtype;
  char *residual_out;  // backward: the new residual, read
  int64_t residual_out_dtype;
  const float *weight, *bias;  // (dim)
  float *mean, *rstd;          // (rows); mean null for RMSNorm; rstd null if it is not needed; backward reads both
  float *dresidual;            // backward: dx in float32, or null
  float *dweight, *dbias;      // backward; dbias may be null
};
