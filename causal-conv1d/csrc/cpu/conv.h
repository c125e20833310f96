// Arguments of the causal convolution kernels. Every field is eight bytes wide; the Python side packs them in this order.
#pragma once

#include <stdint.h>

struct ConvArgs {
  int64_t batch, len, dim, width, silu, reverse, threads;
  int64_t accumulate_dx;  // backward: add to dx instead of overwriting it
  // (batch, tokens, channels): pointer, dtype (0 float32, 1 bfloat16, 2 float16), strides of batch and token in elements;
  // channels are adjacent. For conv_rows_* tokens are adjacent, and the token stride is that of channels.
  char *x;
  int64_t x_dtype, x_batch_stride, x_token_stride;
  char *out;  // forward: the result; backward: its gradient
  int64_t out_dtype, out_batch_stride, out_token_stride;
  char *dx;
  int64_t dx_dtype, dx_batch_stride, dx_token_stride;
  const float *weight, *bias;  // (E, W), (E) or null
  const float *initial;        // (B, W-1, E) or null
  float *dinitial;             // the same, or null
  float *dweight, *dbias;      // (E, W), (E) or null
};

// The convolution, and at once a projection of its output: projected (B, L, outputs) = out (B, L, E) weight^T.
struct ConvProjectArgs {
  ConvArgs conv;  // out in float32
  const float *weight;  // (outputs, E)
  int64_t outputs;
  float *projected;  // contiguous
};
