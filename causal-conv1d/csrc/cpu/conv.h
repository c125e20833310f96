// Arguments of the causal convolution kernels. Every field is eight bytes wide; conv/cpu.py packs them in this order.
#pragma once

#include "common/tokens.h"

struct ConvArgs {
  int64_t batch, len, dim, width, silu, reverse, threads;
  int64_t accumulate_dx;  // backward: add to dx instead of overwriting it
  // For conv_rows_* tokens are adjacent, and the token stride is that of channels.
  Tokens x;
  Tokens out;  // forward: the result; backward: its gradient
  Tokens dx;
  const float *weight, *bias;  // (E, W), (E) or null
  const float *initial;        // (B, W-1, E) or null
  float *dinitial;             // the same, or null
  float *dweight, *dbias;      // (E, W), (E) or null
};

// The convolution, and at once a projection of its output: projected (B, L, outputs) = out (B, L, E) weight^T.
struct ConvProjectArgs {
  ConvArgs conv;  // out in float32
  const float *project_weight;  // (outputs, E)
  int64_t outputs;
  float *projected;  // contiguous
};
