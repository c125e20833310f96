// Arguments of a language model's step for one token. Every field is eight bytes wide; models/native_decoder.py packs them
// in this order.
#pragma once

#include <stdint.h>

// One block. Matrices are (outputs, inputs) in the step's dtype, all else is float32; biases may be null.
struct DecodeLayer {
  const float *norm_weight, *norm_bias;     // (D)
  const char *in_proj;                      // (2E, D)
  const float *in_bias;                     // (2E)
  const float *conv_weight, *conv_bias;     // (E, W), (E)
  const char *x_proj, *dt_proj;             // (R + 2N, E), (E, R)
  const float *dt_bias, *log2_decay, *skip;  // (E), (E, N) A * log2(e), (E)
  const char *out_proj;                     // (D, E)
  const float *out_bias;                    // (D)
  char *conv_state;                         // (batch, E, W), oldest first
  int64_t conv_state_dtype;
  float *scan_state;  // (batch, E, N)
};

struct DecodeArgs {
  int64_t batch, layers, dim, inner, states, rank, width, vocab, rms, dtype, threads;
  double eps;
  const DecodeLayer *layer;
  const char *embedded;                    // (batch, D)
  const float *norm_weight, *norm_bias;    // (D)
  const char *head;                        // (vocab, D)
  char *logits;                            // (batch, vocab)
};
