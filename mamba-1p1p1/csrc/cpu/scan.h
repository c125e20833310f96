// Arguments of the selective scan kernels. Every field is eight bytes wide; selective_scan/cpu.py packs them in this order.
#pragma once

#include "common/tokens.h"

struct ScanArgs {
  int64_t batch, len, dim, states, groups;
  int64_t rank;  // > 0: `delta` is the low-rank step (B, L, rank) and dt_weight (E, rank) takes it to E channels
  int64_t softplus, reverse, accumulate, threads;
  int64_t b_constant, c_constant;  // B or C is (E, N) float32 instead of (B, L, G, N)
  int64_t b_group_stride, c_group_stride;
  double scale;
  Tokens u, delta, z, B, C, out;
  const float *A, *D, *bias, *dt_weight, *initial_state;
  float *last_state;
  float *saved;  // state before each chunk: (B, chunks, blocks, N, BLOCK), or null
};

struct ScanGradArgs {
  ScanArgs in;  // out unused
  Tokens dout, du, ddelta, dz;
  int64_t accumulate_dz;
  const float *dlast_state;
  float *dinitial_state;  // (B, E, N) or null
  float *dA, *dD, *dbias;  // (E, N), (E), (E); dD and dbias null if absent
  float *dB_constant, *dC_constant;  // (E, N), null unless that input is constant
  float *dx;  // (B, L, G, rank + 2N): gradients of the low-rank step, of B and of C, side by side
  float *ddt_weight;  // (E, rank), null if rank is 0
};

// Tokens between two kept states; also the tile that stays in the first-level cache.
constexpr int64_t SCAN_CHUNK = 32;
