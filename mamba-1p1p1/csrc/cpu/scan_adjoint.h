// The recurrence of the states' adjoint over one tile, from its last token to its first.
#pragma once

#include "scan_states.h"

namespace {

// Running sums of one block over all chunks: (rows, BLOCK) each.
struct BlockSums {
  float *state, *A, *B, *C, *dt_weight, *D, *bias;
  static int64_t rows(const ScanArgs &a) { return a.states * (2 + a.b_constant + a.c_constant) + a.rank + 2; }
  void place(float *memory, const ScanArgs &a) {
    state = memory;
    A = state + a.states * BLOCK;
    B = A + a.states * BLOCK;
    C = B + a.b_constant * a.states * BLOCK;
    dt_weight = C + a.c_constant * a.states * BLOCK;
    D = dt_weight + a.rank * BLOCK;
    bias = D + BLOCK;
  }
};

// What the adjoint recurrence of one tile reads and adds to. kept_h and kept_decay hold one group of states.
struct Adjoint {
  int64_t tokens, states;
  const float *dt, *dtu, *dy, *B, *C, *log2_decay, *before, *kept_h, *kept_decay;
  const BlockSums &sums;
  float *dBC;  // (tokens, 2 * states): per group of states its share of dB, then of dC
  float *dtu_grad, *dt_grad;
  Ahead *ahead;
};

struct Two {
  vf B, C;
};

// The sums over lanes of dB and dC of KEPT_STATES states: `leaf(j)` gives the vectors of state j. Folding as they come, in
// an order that needs few registers, costs less than adding (tokens, states) whole vectors in memory would.
template <int W, class Leaf> VIM_INLINE Two fold_states(const Leaf &leaf, int j) {
  if constexpr (W == (LANES < KEPT_STATES ? LANES : KEPT_STATES)) {
    return leaf(j);
  } else {
    const Two a = fold_states<2 * W>(leaf, j), b = fold_states<2 * W>(leaf, j + W);
    return {fold<W>(a.B, b.B), fold<W>(a.C, b.C)};
  }
}

template <class Leaf> VIM_INLINE void add_states(float *dBC, const Leaf &leaf) {
  if constexpr (LANES == 2 * KEPT_STATES) {
    const Two sums = fold_states<1>(leaf, 0);
    store(dBC, load(dBC) + fold<KEPT_STATES>(sums.B, sums.C));
  } else {
    for (int j = 0; j < KEPT_STATES; j += LANES) {
      const Two sums = fold_states<1>(leaf, j);
      store(dBC + j, load(dBC + j) + sums.B);
      store(dBC + KEPT_STATES + j, load(dBC + KEPT_STATES + j) + sums.C);
    }
  }
}

// The adjoint recurrence of states [first, first + count) over one tile. Per state: g = dL/dh_t, of which decay * g goes
// on to h_{t-1}. dtu_grad receives dL/d(dt u), dt_grad the part of dL/d(dt) that comes through the decay, divided by
// log 2; the first group of states sets them, later ones add. STATES: the count if known when compiling, or 0.
template <bool B_CONSTANT, bool C_CONSTANT, int STATES>
__attribute__((noinline)) void adjoint_states(const Adjoint &r, int64_t first, int64_t runtime_count) {
  const int64_t n = r.states, count = STATES ? STATES : runtime_count;
  constexpr bool IN_REGISTERS = STATES > 0 && LANES == 16;
  constexpr int HELD = IN_REGISTERS ? STATES : 1;
  const float *log2_decay = r.log2_decay + first * BLOCK;
  const float *B = r.B + first * (B_CONSTANT ? BLOCK : 1), *C = r.C + first * (C_CONSTANT ? BLOCK : 1);
  float *state = r.sums.state + first * BLOCK, *sum_A = r.sums.A + first * BLOCK;
  float *constant_B = r.sums.B + first * BLOCK, *constant_C = r.sums.C + first * BLOCK;
  __asm__("" : "+r"(log2_decay), "+r"(B), "+r"(C));  // else GCC keeps the address of every row in a register of its own
  vf held_state[HELD], held_A[HELD];
  if constexpr (IN_REGISTERS) {
#pragma GCC unroll 16
    for (int j = 0; j < STATES; ++j) {
      held_state[j] = load(state + j * BLOCK);
      held_A[j] = load(sum_A + j * BLOCK);
    }
  }
  for (int64_t t = r.tokens - 1; t >= 0; --t) {
    const float *h = r.kept_h + t * count * BLOCK, *decay = r.kept_decay + t * count * BLOCK;
    const float *previous = t ? h - count * BLOCK : r.before + first * BLOCK;
    float *dBC = r.dBC + t * 2 * n + 2 * first;
    vf step[NV], input[NV], dout[NV], to_input[NV], to_step[NV];
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * BLOCK + v * LANES;
      step[v] = load(r.dt + at);
      input[v] = load(r.dtu + at);
      dout[v] = load(r.dy + at);
      to_input[v] = first ? load(r.dtu_grad + at) : vf{};
      to_step[v] = first ? load(r.dt_grad + at) : vf{};
    }
    if (first == 0)
      r.ahead->fetch_chunk(1);
    const auto update = [&](int64_t j) __attribute__((always_inline)) {
      Two sums;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = j * BLOCK + v * LANES;
        const vf b = B_CONSTANT ? load(B + at) : broadcast(B[t * n + j]);
        const vf c = C_CONSTANT ? load(C + at) : broadcast(C[t * n + j]);
        const vf g = (IN_REGISTERS ? held_state[IN_REGISTERS ? j : 0] : load(state + at)) + c * dout[v];
        const vf through = g * load(decay + at);
        const vf exponent = through * load(previous + at);
        to_input[v] += g * b;
        to_step[v] += exponent * load(log2_decay + at);
        if constexpr (IN_REGISTERS) {
          held_state[j] = through;
          held_A[j] += exponent * step[v];
        } else {
          store(state + at, through);
          store(sum_A + at, load(sum_A + at) + exponent * step[v]);
        }
        const vf to_B = g * input[v], to_C = dout[v] * load(h + at);
        if (B_CONSTANT)
          store(constant_B + at, load(constant_B + at) + to_B);
        if (C_CONSTANT)
          store(constant_C + at, load(constant_C + at) + to_C);
        sums.B = v ? sums.B + to_B : to_B;
        sums.C = v ? sums.C + to_C : to_C;
      }
      return sums;
    };
    if constexpr (STATES == KEPT_STATES) {
      add_states(dBC, update);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const Two sums = update(j);
        if (!B_CONSTANT)
          dBC[j] += sum_lanes(sums.B);
        if (!C_CONSTANT)
          dBC[count + j] += sum_lanes(sums.C);
      }
    }
    for (int v = 0; v < NV; ++v) {
      store(r.dtu_grad + t * BLOCK + v * LANES, to_input[v]);
      store(r.dt_grad + t * BLOCK + v * LANES, to_step[v]);
    }
  }
  if constexpr (IN_REGISTERS) {
#pragma GCC unroll 16
    for (int j = 0; j < STATES; ++j) {
      store(state + j * BLOCK, held_state[j]);
      store(sum_A + j * BLOCK, held_A[j]);
    }
  }
}

void adjoint_group(const ScanArgs &a, const Adjoint &r, int64_t first, int64_t count) {
  if (a.b_constant)
    a.c_constant ? adjoint_states<true, true, 0>(r, first, count) : adjoint_states<true, false, 0>(r, first, count);
  else if (a.c_constant)
    adjoint_states<false, true, 0>(r, first, count);
  else if (count == KEPT_STATES)
    adjoint_states<false, false, KEPT_STATES>(r, first, count);
  else
    adjoint_states<false, false, 0>(r, first, count);
}

}  // namespace
