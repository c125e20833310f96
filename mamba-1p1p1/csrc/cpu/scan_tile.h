// The parts of a scan that work on one tile: SCAN_CHUNK tokens of one block of BLOCK channels, in float32, tokens in scan
// order. A tile is stored token after token, BLOCK floats each; states are stored state after state.
#pragma once

#include "common/runtime.h"
#include "common/simd_math.h"
#include "scan.h"

namespace {

constexpr int64_t TILE = SCAN_CHUNK * BLOCK;

// How the channels are cut into blocks (of one group each) and the blocks into slabs, one slab being one task. The
// slabs of a backward pass depend on the shapes only, so that its sums have one order whatever the threads; a forward pass
// has no sums across channels and takes as few as keep every thread busy, because each slab converts B and C anew.
struct Cut {
  int64_t group_dim, blocks, slabs, slab_blocks, chunks;

  Cut(const ScanArgs &a, bool forward) {
    group_dim = a.dim / a.groups;
    blocks = (group_dim + BLOCK - 1) / BLOCK;
    slabs = 1;
    const auto busy = [&](int64_t tasks) { return tasks % a.threads == 0 || tasks >= 4 * a.threads; };
    if (forward)
      while (slabs < blocks && !busy(slabs * a.groups * a.batch))
        slabs = min_of(blocks, slabs * 2);
    else if (blocks > 1) {
      slabs = ((blocks + 7) / 8 + 1) / 2 * 2;
      while (slabs > 1 && slabs / 2 * a.groups * a.batch >= 16)
        slabs /= 2;
    }
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

// (count, n) row-major → (n, BLOCK), times `factor`; lanes beyond `count` are zero.
VIM_INLINE void transpose_in(float *dst, const float *src, int64_t count, int64_t n, float factor) {
#if defined(__AVX512F__)
  if (count == BLOCK && n <= INT32_MAX / BLOCK) {
    const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32((int32_t)n));
    for (int64_t j = 0; j < n; ++j)
      store(dst + j * BLOCK, (vf)_mm512_i32gather_ps(rows, src + j, 4) * factor);
    return;
  }
#endif
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

// Tile memory: row t at data + t * stride floats.
struct View {
  const float *data;
  int64_t stride;
  VIM_INLINE vf at(int64_t t, int v) const { return load(data + t * stride + v * LANES); }
};

// A tile of x as float32: x itself if it is float32 and the block whole, else a copy in `spare`.
View load_tile(float *spare, const Tokens &x, const Slab &s, int64_t start, int64_t tokens, int64_t channel,
               int64_t count) {
  if (count == BLOCK) {
    const char *from = row(x, s.item, s.token(start), channel);
    const int64_t stride = s.step * x.token_stride;
    if (x.dtype == kFloat32)
      return {(const float *)from, stride};
    if (x.dtype == kBFloat16)
      load_blocks<kBFloat16>(spare, from, stride * 2, tokens);
    else
      load_blocks<kFloat16>(spare, from, stride * 2, tokens);
    return {spare, BLOCK};
  }
  for (int64_t t = 0; t < tokens; ++t)
    load_row(spare + t * BLOCK, row(x, s.item, s.token(start + t), channel), x.dtype, count);
  if (count <= BLOCK - LANES)  // load_row pads its last vector only
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = (count + LANES - 1) / LANES * LANES; c < BLOCK; ++c)
        spare[t * BLOCK + c] = 0.0f;
  return {spare, BLOCK};
}

// Memory that later tiles will read or write, fetched while one computes: a block's rows lie a whole token apart, which no
// hardware prefetcher follows. The next tile's rows go to the first-level cache; the rows of the next chunk go to the
// second level, row by row over all blocks of the slab, so that each page is visited once.
struct Ahead {
  static constexpr int MOST = 8;
  const Tokens *inputs[MOST];
  const char *tile[MOST], *chunk[MOST];
  int64_t strides[MOST], bytes[MOST];
  int64_t count = 0, tile_rows = 0, chunk_rows = 0, columns = 1;
  int64_t rows_done[2], column[2];

  void add(const Tokens &x, const Slab &s) {
    if (!x.data)
      return;
    inputs[count] = &x;
    strides[count] = s.step * x.token_stride * size_of(x.dtype);
    bytes[count++] = BLOCK * size_of(x.dtype);
  }
  // The next chunk has `rows` tokens from `start` on; none if rows is 0.
  void aim_chunk(const Slab &s, int64_t start, int64_t rows, int64_t channel) {
    chunk_rows = rows;
    for (int part = 0; part < 2; ++part)
      rows_done[part] = column[part] = 0;
    for (int64_t i = 0; rows && i < count; ++i)
      chunk[i] = row(*inputs[i], s.item, s.token(start), channel);
  }
  void aim_tile(const Slab &s, int64_t start, int64_t rows, int64_t channel) {
    tile_rows = rows;
    for (int64_t i = 0; rows && i < count; ++i)
      tile[i] = row(*inputs[i], s.item, s.token(start), channel);
  }
  VIM_INLINE void fetch_tile(int64_t t) {
    if (t < tile_rows)
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(tile[i], 0, 3);
        tile[i] += strides[i];
      }
  }
  // One block of one row of the even (part 0) or odd (part 1) tensors; halves, so that two loops can share the work.
  VIM_INLINE void fetch_chunk(int part) {
    if (rows_done[part] >= chunk_rows)
      return;
    for (int64_t i = part; i < count; i += 2)
      __builtin_prefetch(chunk[i] + rows_done[part] * strides[i] + column[part] * bytes[i], 0, 2);
    if (++column[part] == columns) {
      column[part] = 0;
      ++rows_done[part];
    }
  }
};

void store_tile(const float *src, const Tokens &x, const Slab &s, int64_t start, int64_t tokens, int64_t channel,
                int64_t count) {
  if (count == BLOCK) {
    char *to = row(x, s.item, s.token(start), channel);
    const int64_t stride = s.step * x.token_stride * size_of(x.dtype);
    if (x.dtype == kFloat32)
      store_blocks<kFloat32>(to, src, stride, tokens);
    else if (x.dtype == kBFloat16)
      store_blocks<kBFloat16>(to, src, stride, tokens);
    else
      store_blocks<kFloat16>(to, src, stride, tokens);
    return;
  }
  for (int64_t t = 0; t < tokens; ++t)
    store_row(row(x, s.item, s.token(start + t), channel), x.dtype, src + t * BLOCK, count);
}

// Where a kernel writes a tile: the tensor itself if it is float32 and the block whole, else a copy for `finish` to store.
struct Target {
  float *data;
  int64_t stride;
  VIM_INLINE void put(int64_t t, int v, vf x) const { store(data + t * stride + v * LANES, x); }
};

VIM_INLINE bool direct(const Tokens &x, int64_t count) { return count == BLOCK && x.dtype == kFloat32; }

VIM_INLINE Target target_tile(float *spare, const Tokens &x, const Slab &s, int64_t start, int64_t channel,
                              int64_t count) {
  if (direct(x, count))
    return {(float *)row(x, s.item, s.token(start), channel), s.step * x.token_stride};
  return {spare, BLOCK};
}

VIM_INLINE void finish(const Target &target, const Tokens &x, const Slab &s, int64_t start, int64_t tokens,
                       int64_t channel, int64_t count) {
  if (!direct(x, count))
    store_tile(target.data, x, s, start, tokens, channel, count);
}

// Parameters of one block, laid out for its lanes.
struct BlockParams {
  float *log2_decay;  // (N, BLOCK), A * log2(e)
  float *dt_weight;  // (rank, BLOCK)
  float *B, *C;  // (N, BLOCK), if constant
  float bias[BLOCK], D[BLOCK], largest[BLOCK];  // largest |log2_decay| per channel

  static int64_t floats(const ScanArgs &a) {
    return (a.states + a.rank + a.b_constant * a.states + a.c_constant * a.states) * BLOCK;
  }
  void fill(float *memory, const ScanArgs &a, int64_t channel, int64_t count) {
    const int64_t n = a.states;
    log2_decay = memory;
    dt_weight = log2_decay + n * BLOCK;
    B = dt_weight + a.rank * BLOCK;
    C = B + a.b_constant * n * BLOCK;
    transpose_in(log2_decay, a.A + channel * n, count, n, LOG2E);
    if (a.rank)
      transpose_in(dt_weight, a.dt_weight + channel * a.rank, count, a.rank, 1.0f);
    if (a.b_constant)
      transpose_in(B, (const float *)a.B.data + channel * n, count, n, 1.0f);
    if (a.c_constant)
      transpose_in(C, (const float *)a.C.data + channel * n, count, n, 1.0f);
    vector_in(bias, a.bias ? a.bias + channel : nullptr, count);
    vector_in(D, a.D ? a.D + channel : nullptr, count);
    for (int64_t c = 0; EXP2_CHECKED && c < BLOCK; ++c) {
      largest[c] = 0.0f;
      for (int64_t j = 0; j < n; ++j) {
        const float m = __builtin_fabsf(log2_decay[j * BLOCK + c]);
        largest[c] = m <= largest[c] ? largest[c] : m;  // a NaN becomes the largest and makes the block use `exp2_any`
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

// dt and dt * u, and the derivative of dt by delta if `slope` is given. True if every |dt * log2_decay| is within what
// `exp2_small` takes.
bool step_tile(float *dt, float *dtu, float *slope, const ScanArgs &a, const BlockParams &p, const Shared &shared,
               View delta, View u, int64_t tokens) {
  constexpr int TOGETHER = NV == 1 ? 4 : 2;  // tokens, to share the loads of a weight and to hide its latency
  vi inside = vi{} - 1;
  for (int64_t first = 0; first < tokens; first += TOGETHER) {
    vf x[TOGETHER][NV];
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        x[i][v] = load(p.bias + v * LANES);
    if (a.rank) {
      const float *low = shared.low_rank + first * a.rank;  // rows beyond `tokens` exist
      for (int64_t r = 0; r < a.rank; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const vf weight = load(p.dt_weight + r * BLOCK + v * LANES);
#pragma GCC unroll 4
          for (int i = 0; i < TOGETHER; ++i)
            x[i][v] += low[i * a.rank + r] * weight;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; ++i) {
      const int64_t t = first + i;
      if (t >= tokens)
        break;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = t * BLOCK + v * LANES;
        vf step = x[i][v];
        if (!a.rank)
          step += delta.at(t, v);
        if (a.softplus) {
          vf derivative;
          step = softplus(step, slope ? &derivative : nullptr);
          if (slope)
            store(slope + at, derivative);
        }
        if (EXP2_CHECKED) {
          const vf reach = (vf)((vi)step & 0x7fffffff) * load(p.largest + v * LANES);
          inside &= reach <= EXP2_RANGE;
        }
        store(dt + at, step);
        store(dtu + at, step * u.at(t, v));
      }
    }
  }
  bool all = true;
  if (EXP2_CHECKED)
    for (int i = 0; i < LANES; ++i)
      all &= inside[i] != 0;
  return all;
}

}  // namespace
