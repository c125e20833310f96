// The parts of a scan that work on one tile: SCAN_CHUNK tokens of one block of BLOCK channels, in float32, tokens in scan
// order. A tile is stored token after token, BLOCK floats each; states are stored state after state.
#pragma once

#include "runtime.h"
#include "scan.h"
#include "simd.h"

namespace {

constexpr int64_t TILE = SCAN_CHUNK * BLOCK;

// How the channels are cut into blocks (of one group each) and the blocks into slabs, one slab being one task. The
// slabs of a backward pass depend on the shapes only, so that its sums have one order whatever the threads.
struct Cut {
  int64_t group_dim, blocks, slabs, slab_blocks, chunks;

  Cut(const ScanArgs &a, bool many) {
    group_dim = a.dim / a.groups;
    blocks = (group_dim + BLOCK - 1) / BLOCK;
    slabs = (blocks + 7) / 8;
    slabs = blocks > 1 ? (slabs + 1) / 2 * 2 : 1;
    if (many)  // without sums across channels, as many tasks as keep every thread busy
      while (slabs < blocks && slabs * a.groups * a.batch < 2 * a.threads)
        slabs = min_of(blocks, slabs * 2);
    slab_blocks = max_of(1, (blocks + slabs - 1) / slabs);
    slabs = (blocks + slab_blocks - 1) / slab_blocks;
    chunks = (a.len + SCAN_CHUNK - 1) / SCAN_CHUNK;
  }
};

// One task: a batch item and a slab of a group. Token i in scan order is `first + i * step` in memory.
struct Slab {
  int64_t item, group, index, first_block, last_block, first, step;

  Slab(const ScanArgs &a, const Cut &cut, int64_t task) {
    index = task % cut.slabs;
    group = task / cut.slabs % a.groups;
    item = task / cut.slabs / a.groups;
    first_block = index * cut.slab_blocks;
    last_block = min_of(first_block + cut.slab_blocks, cut.blocks);
    first = a.reverse ? a.len - 1 : 0;
    step = a.reverse ? -1 : 1;
  }
  int64_t channel(const Cut &cut, int64_t block) const { return group * cut.group_dim + block * BLOCK; }
  int64_t count(const Cut &cut, int64_t block) const { return min_of(BLOCK, cut.group_dim - block * BLOCK); }
  int64_t token(int64_t i) const { return first + i * step; }
};

VIM_INLINE char *row(const Tokens &x, int64_t item, int64_t token, int64_t channel) {
  return x.data + (item * x.batch_stride + token * x.token_stride + channel) * size_of(x.dtype);
}

// (count, n) row-major → (n, BLOCK), times `factor`; lanes beyond `count` are zero.
VIM_INLINE void transpose_in(float *dst, const float *src, int64_t count, int64_t n, float factor) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < BLOCK; ++c)
      dst[j * BLOCK + c] = c < count ? src[c * n + j] * factor : 0.0f;
}

VIM_INLINE void transpose_out(float *dst, const float *src, int64_t count, int64_t n) {
  for (int64_t c = 0; c < count; ++c)
    for (int64_t j = 0; j < n; ++j)
      dst[c * n + j] = src[j * BLOCK + c];
}

VIM_INLINE void vector_in(float *dst, const float *src, int64_t count) {
  for (int64_t c = 0; c < BLOCK; ++c)
    dst[c] = src && c < count ? src[c] : 0.0f;
}

void load_tile(float *dst, const Tokens &x, const Slab &s, int64_t start, int64_t tokens, int64_t channel,
               int64_t count) {
  if (count == BLOCK) {
    const char *from = row(x, s.item, s.token(start), channel);
    const int64_t stride = s.step * x.token_stride * size_of(x.dtype);
    if (x.dtype == F32)
      load_blocks<F32>(dst, from, stride, tokens);
    else if (x.dtype == BF16)
      load_blocks<BF16>(dst, from, stride, tokens);
    else
      load_blocks<F16>(dst, from, stride, tokens);
    return;
  }
  for (int64_t t = 0; t < tokens; ++t)
    load_row(dst + t * BLOCK, row(x, s.item, s.token(start + t), channel), x.dtype, count);
  if (count <= BLOCK - LANES)  // load_row pads its last vector only
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = (count + LANES - 1) / LANES * LANES; c < BLOCK; ++c)
        dst[t * BLOCK + c] = 0.0f;
}

void store_tile(const float *src, const Tokens &x, const Slab &s, int64_t start, int64_t tokens, int64_t channel,
                int64_t count) {
  if (count == BLOCK) {
    char *to = row(x, s.item, s.token(start), channel);
    const int64_t stride = s.step * x.token_stride * size_of(x.dtype);
    if (x.dtype == F32)
      store_blocks<F32>(to, src, stride, tokens);
    else if (x.dtype == BF16)
      store_blocks<BF16>(to, src, stride, tokens);
    else
      store_blocks<F16>(to, src, stride, tokens);
    return;
  }
  for (int64_t t = 0; t < tokens; ++t)
    store_row(row(x, s.item, s.token(start + t), channel), x.dtype, src + t * BLOCK, count);
}

// Parameters of one block, laid out for its lanes.
struct BlockParams {
  float *A2;         // (N, BLOCK), A * log2(e)
  float *dt_weight;  // (rank, BLOCK)
  float *B, *C;      // (N, BLOCK), if constant
  float bias[BLOCK], D[BLOCK], largest[BLOCK];  // largest |A2| per channel

  static int64_t floats(const ScanArgs &a) {
    return (a.states + a.rank + a.b_constant * a.states + a.c_constant * a.states) * BLOCK;
  }
  void fill(float *memory, const ScanArgs &a, int64_t channel, int64_t count) {
    const int64_t n = a.states;
    A2 = memory;
    dt_weight = A2 + n * BLOCK;
    B = dt_weight + a.rank * BLOCK;
    C = B + a.b_constant * n * BLOCK;
    transpose_in(A2, a.A + channel * n, count, n, LOG2E);
    if (a.rank)
      transpose_in(dt_weight, a.dt_weight + channel * a.rank, count, a.rank, 1.0f);
    if (a.b_constant)
      transpose_in(B, (const float *)a.B.data + channel * n, count, n, 1.0f);
    if (a.c_constant)
      transpose_in(C, (const float *)a.C.data + channel * n, count, n, 1.0f);
    vector_in(bias, a.bias ? a.bias + channel : nullptr, count);
    vector_in(D, a.D ? a.D + channel : nullptr, count);
    for (int64_t c = 0; c < BLOCK; ++c) {
      largest[c] = 0.0f;
      for (int64_t j = 0; j < n; ++j) {
        const float m = __builtin_fabsf(A2[j * BLOCK + c]);
        largest[c] = m <= largest[c] ? largest[c] : m;  // a NaN becomes the largest and sends the block the safe way
      }
    }
  }
};

// What all channels of a group share in one chunk: B, C and the low-rank step, in float32 (tokens, states).
struct Shared {
  float *B, *C, *low_rank;

  static int64_t floats(const ScanArgs &a) { return SCAN_CHUNK * (2 * (a.states + LANES) + a.rank + LANES); }
  explicit Shared(float *memory, const ScanArgs &a) {
    B = memory;
    C = B + SCAN_CHUNK * (a.states + LANES);
    low_rank = C + SCAN_CHUNK * (a.states + LANES);
  }
  void fill(const ScanArgs &a, const Slab &s, int64_t start, int64_t tokens) {
    const int64_t n = a.states;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t token = s.token(start + t);
      if (!a.b_constant)
        load_row(B + t * n, row(a.B, s.item, token, s.group * a.b_group_stride), a.B.dtype, n);
      if (!a.c_constant)
        load_row(C + t * n, row(a.C, s.item, token, s.group * a.c_group_stride), a.C.dtype, n);
      if (a.rank)
        load_row(low_rank + t * a.rank, row(a.delta, s.item, token, 0), a.delta.dtype, a.rank);
    }
  }
};

// dt, and the derivative of dt by delta if `slope` is given. True if every |dt * A2| is within EXP2_RANGE.
bool step_tile(float *dt, float *slope, const ScanArgs &a, const BlockParams &p, const Shared &shared,
               int64_t tokens) {
  vi inside = vi{} - 1;
  for (int64_t t = 0; t < tokens; ++t)
    for (int v = 0; v < NV; ++v) {
      float *at = dt + t * BLOCK + v * LANES;
      vf x = load(p.bias + v * LANES);
      if (a.rank) {
        const float *low = shared.low_rank + t * a.rank;
        for (int64_t r = 0; r < a.rank; ++r)
          x += low[r] * load(p.dt_weight + r * BLOCK + v * LANES);
      } else {
        x += load(at);
      }
      if (a.softplus) {
        vf derivative;
        x = softplus(x, slope ? &derivative : nullptr);
        if (slope)
          store(slope + t * BLOCK + v * LANES, derivative);
      }
      const vf reach = (vf)((vi)x & 0x7fffffff) * load(p.largest + v * LANES);
      inside &= reach <= EXP2_RANGE;
      store(at, x);
    }
  bool all = true;
  for (int i = 0; i < LANES; ++i)
    all &= inside[i] != 0;
  return all;
}

template <bool SMALL> VIM_INLINE vf decay_of(vf dt, vf A2) { return SMALL ? exp2_small(dt, A2) : exp2_any(dt * A2); }

// y_t = C_t h_t (without the skip), h advanced over the tile. KEEP stores every h_t and decay_t for a backward pass.
// STATES: the number of states if known when compiling, or 0.
template <bool SMALL, bool KEEP, bool B_CONSTANT, bool C_CONSTANT, int STATES>
__attribute__((noinline)) void run_tile(int64_t tokens, int64_t states, const float *dt, const float *dtu, const float *B, const float *C,
              const float *A2, float *h, float *y, float *kept_h, float *kept_decay) {
  const int64_t n = STATES ? STATES : states;
  constexpr bool IN_REGISTERS = STATES > 0 && LANES == 16;
  vf state[IN_REGISTERS ? STATES : 1];
  if constexpr (IN_REGISTERS) {
#pragma GCC unroll 16
    for (int j = 0; j < STATES; ++j)
      state[j] = load(h + j * BLOCK);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    vf step[NV], input[NV], total[NV];
    for (int v = 0; v < NV; ++v) {
      step[v] = load(dt + t * BLOCK + v * LANES);
      input[v] = load(dtu + t * BLOCK + v * LANES);
      total[v] = vf{};
    }
#pragma GCC unroll 16
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = j * BLOCK + v * LANES;
        const vf b = B_CONSTANT ? load(B + at) : broadcast(B[t * n + j]);
        const vf c = C_CONSTANT ? load(C + at) : broadcast(C[t * n + j]);
        const vf decay = decay_of<SMALL>(step[v], load(A2 + at));
        vf next;
        if constexpr (IN_REGISTERS)
          next = state[j] = decay * state[j] + input[v] * b;
        else {
          next = decay * load(h + at) + input[v] * b;
          store(h + at, next);
        }
        if (KEEP) {
          store(kept_h + t * n * BLOCK + at, next);
          store(kept_decay + t * n * BLOCK + at, decay);
        }
        total[v] += c * next;
      }
    for (int v = 0; v < NV; ++v)
      store(y + t * BLOCK + v * LANES, total[v]);
  }
  if constexpr (IN_REGISTERS) {
#pragma GCC unroll 16
    for (int j = 0; j < STATES; ++j)
      store(h + j * BLOCK, state[j]);
  }
}

template <bool SMALL, bool KEEP>
void run_tile_for(const ScanArgs &a, const BlockParams &p, const Shared &shared, int64_t tokens, const float *dt,
                  const float *dtu, float *h, float *y, float *kept_h, float *kept_decay) {
  const float *B = a.b_constant ? p.B : shared.B, *C = a.c_constant ? p.C : shared.C;
  const int64_t n = a.states;
  if (!a.b_constant && !a.c_constant) {
    if (n == 16)
      run_tile<SMALL, KEEP, false, false, 16>(tokens, n, dt, dtu, B, C, p.A2, h, y, kept_h, kept_decay);
    else
      run_tile<SMALL, KEEP, false, false, 0>(tokens, n, dt, dtu, B, C, p.A2, h, y, kept_h, kept_decay);
  } else if (a.b_constant && a.c_constant) {
    run_tile<SMALL, KEEP, true, true, 0>(tokens, n, dt, dtu, B, C, p.A2, h, y, kept_h, kept_decay);
  } else if (a.b_constant) {
    run_tile<SMALL, KEEP, true, false, 0>(tokens, n, dt, dtu, B, C, p.A2, h, y, kept_h, kept_decay);
  } else {
    run_tile<SMALL, KEEP, false, true, 0>(tokens, n, dt, dtu, B, C, p.A2, h, y, kept_h, kept_decay);
  }
}

}  // namespace
