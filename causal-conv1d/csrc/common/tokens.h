// How the CPU kernels are given a tensor.
#pragma once

#include <stdint.h>

// A (batch, tokens, channels) tensor with adjacent channels: dtype as in dtype.h, strides in elements. A null pointer stands
// for an absent tensor.
struct Tokens {
  char *data;
  int64_t dtype, batch_stride, token_stride;
};
