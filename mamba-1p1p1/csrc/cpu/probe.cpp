// Independent chains of fused multiply-adds, enough of them to hide the latency.

#include "common/simd.h"
#include "probe.h"

namespace {

constexpr int CHAINS = 12;

void fma_rate(const ProbeArgs *args) {
  vf chain[CHAINS];
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i)
    chain[i] = broadcast((float)i);
  const vf a = broadcast(0.999f), b = broadcast(1e-3f);
  for (int64_t r = 0; r < args->repeats; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i)
      chain[i] = chain[i] * a + b;
  }
  vf total = chain[0];
#pragma GCC unroll 12
  for (int i = 1; i < CHAINS; ++i)
    total += chain[i];
  *args->flops = 2.0 * CHAINS * LANES * (double)args->repeats + 0.0 * (double)sum_lanes(total);
}

}  // namespace

namespace VIM_ISA {
void (*fma_rate)(const ProbeArgs *) = ::fma_rate;
}
