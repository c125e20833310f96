// The recurrence of the states over one tile.
#pragma once

#include "scan_tile.h"

namespace {

// States worked on together: as many registers, and in a backward pass also a group's states and decays of a whole
// chunk in the first-level cache.
constexpr int64_t MOST_STATES = 16, KEPT_STATES = 8;

// exp(dt A) of COUNT states next to one another, for each vector of a block: (COUNT, NV).
template <bool SMALL, int COUNT> VIM_INLINE void decays_of(vf *r, const vf *dt, const float *log2_decay) {
  vf step[COUNT * NV], slope[COUNT * NV];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT * NV; ++i) {
    step[i] = dt[i % NV];
    slope[i] = load(log2_decay + i * LANES);
  }
  if constexpr (SMALL)
    exp2_small<COUNT * NV>(r, step, slope);
  else
#pragma GCC unroll 4
    for (int i = 0; i < COUNT * NV; ++i)
      r[i] = exp2_any(step[i] * slope[i]);
}

// States [first, first + count) of one block over one tile, with what they need. Pointers are those of the whole block.
struct Run {
  int64_t tokens, states;
  const float *dt, *dtu, *B, *C, *log2_decay;
  float *h, *y, *kept_h, *kept_decay;
  Ahead *ahead;
};

// y_t (+)= C_t h_t (without the skip), h advanced over the tile; the first group of states sets y and fetches ahead, later
// ones add to it. KEEP stores every h_t and decay_t of the group for a backward pass: (tokens, count, BLOCK).
// STATES: the count if known when compiling, or 0.
template <bool SMALL, bool KEEP, bool B_CONSTANT, bool C_CONSTANT, int STATES>
__attribute__((noinline)) void run_states(const Run &r, int64_t first, int64_t runtime_count) {
  const int64_t n = r.states, count = STATES ? STATES : runtime_count;
  constexpr bool IN_REGISTERS = STATES > 0 && LANES == 16;
  constexpr int TOGETHER = STATES > 0 && NV == 2 ? 2 : 1;  // states whose exponentials are worked on side by side
  const float *log2_decay = r.log2_decay + first * BLOCK;
  const float *B = r.B + first * (B_CONSTANT ? BLOCK : 1), *C = r.C + first * (C_CONSTANT ? BLOCK : 1);
  float *h = r.h + first * BLOCK;
  __asm__("" : "+r"(log2_decay), "+r"(B), "+r"(C));  // else GCC keeps the address of every row in a register of its own
  vf state[IN_REGISTERS ? STATES : 1];
  if constexpr (IN_REGISTERS) {
#pragma GCC unroll 16
    for (int j = 0; j < STATES; ++j)
      state[j] = load(h + j * BLOCK);
  }
  for (int64_t t = 0; t < r.tokens; ++t) {
    vf step[NV], input[NV], total[NV];
    for (int v = 0; v < NV; ++v) {
      step[v] = load(r.dt + t * BLOCK + v * LANES);
      input[v] = load(r.dtu + t * BLOCK + v * LANES);
      total[v] = first ? load(r.y + t * BLOCK + v * LANES) : vf{};
    }
    if (first == 0) {
      r.ahead->fetch_tile(t);
      r.ahead->fetch_chunk(0);
      if (!KEEP)  // else the adjoint's loop does it
        r.ahead->fetch_chunk(1);
    }
    float *kept_h = r.kept_h + t * count * BLOCK, *kept_decay = r.kept_decay + t * count * BLOCK;
#pragma GCC unroll 16
    for (int64_t first_j = 0; first_j < count; first_j += TOGETHER) {
      vf decays[TOGETHER * NV];
      decays_of<SMALL, TOGETHER>(decays, step, log2_decay + first_j * BLOCK);
#pragma GCC unroll 4
      for (int i = 0; i < TOGETHER * NV; ++i) {
        const int64_t j = first_j + i / NV, v = i % NV, at = j * BLOCK + v * LANES;
        const vf b = B_CONSTANT ? load(B + at) : broadcast(B[t * n + j]);
        const vf c = C_CONSTANT ? load(C + at) : broadcast(C[t * n + j]);
        vf next;
        if constexpr (IN_REGISTERS)
          next = state[j] = decays[i] * state[j] + input[v] * b;
        else {
          next = decays[i] * load(h + at) + input[v] * b;
          store(h + at, next);
        }
        if (KEEP) {
          store(kept_h + at, next);
          store(kept_decay + at, decays[i]);
        }
        total[v] += c * next;
      }
    }
    for (int v = 0; v < NV; ++v)
      store(r.y + t * BLOCK + v * LANES, total[v]);
  }
  if constexpr (IN_REGISTERS) {
#pragma GCC unroll 16
    for (int j = 0; j < STATES; ++j)
      store(h + j * BLOCK, state[j]);
  }
}

template <bool SMALL, bool KEEP> void run_group(const ScanArgs &a, const Run &r, int64_t first, int64_t count) {
  if (a.b_constant)
    a.c_constant ? run_states<SMALL, KEEP, true, true, 0>(r, first, count)
                 : run_states<SMALL, KEEP, true, false, 0>(r, first, count);
  else if (a.c_constant)
    run_states<SMALL, KEEP, false, true, 0>(r, first, count);
  else if (count == (KEEP ? KEPT_STATES : MOST_STATES))
    run_states<SMALL, KEEP, false, false, KEEP ? KEPT_STATES : MOST_STATES>(r, first, count);
  else
    run_states<SMALL, KEEP, false, false, 0>(r, first, count);
}

}  // namespace
