// The rate at which a core multiplies and adds, which scan.py compares the kernels with: independent chains of fused
// multiply-adds, enough of them to hide the latency. scan.py compiles this with the flags of the kernels' instruction set.

#include "common/simd.h"

namespace {

constexpr int CHAINS = 12;

}  // namespace

// Runs the chains; gives the multiply-adds done, counted per lane.
extern "C" double fma_rate(int64_t repeats) {
  vf chain[CHAINS];
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i)
    chain[i] = broadcast((float)i);
  const vf a = broadcast(0.999f), b = broadcast(1e-3f);
  for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i)
      chain[i] = chain[i] * a + b;
  }
  vf total = chain[0];
#pragma GCC unroll 12
  for (int i = 1; i < CHAINS; ++i)
    total += chain[i];
  return (double)CHAINS * LANES * (double)repeats + 0.0 * (double)sum_lanes(total);
}
