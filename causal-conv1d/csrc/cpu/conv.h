// Arguments of the causal convolution kernels. Every field is eight bytes wide; the Python side packs them in this order.
#pragma once

#include <stdint.h>

struct ConvArgs {
  int64_t batch, len, dim, width, silu, reverse, threads;
  int64_t accumulate_dx;  // backward: add to dx instead of overwriting it
  // (batch, tokens, channels): pointer, dtype (0 float32, 1 bfloat16, 2 float16), strides of batch and token in elements.
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

// One token for each batch item: the window shifts by one and its convolution is returned.
struct ConvUpdateArgs {
  int64_t batch, dim, width, silu, dtype;
  char *x, *out;  // (B, E), channel stride 1
  int64_t x_stride, out_stride;
  char *state;  // (B, E, S), S >= W - 1, the last tokens seen, updated in place
  int64_t state_dtype, state_batch_stride, state_channel_stride, state_len;
  const float *weight, *bias;
  const int64_t *position;  // (B): circular buffer, number of tokens seen so far; null: the state is shifted
};
