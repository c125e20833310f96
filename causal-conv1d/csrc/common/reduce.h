// Sums of partial results in a fixed order: over rows in memory, and over the lanes of a warp.
#pragma once

#include "common/elements.h"

namespace vim {

constexpr int kSumThreads = 256;
constexpr int kSumColumns = 32;  // of a block; its other threads take interleaved runs of rows
constexpr int kSumRuns = kSumThreads / kSumColumns;

// For each of the block's columns: eight interleaved runs of rows in order, then the eight in order. The sum is returned to
// the first kSumColumns threads; all threads of the block must call. Needs kSumThreads floats of shared memory.
VIM_DEVICE float sum_rows(const float *source, int64_t rows, int64_t stride, bool live) {
  float *runs = reinterpret_cast<float *>(vim_shared_memory);
  const int tid = threadIdx.x;
  float sum = 0.0f;
  if (live)
#pragma unroll 4
    for (int64_t row = tid / kSumColumns; row < rows; row += kSumRuns)
      sum += source[row * stride];
  runs[tid] = sum;
  __syncthreads();
  if (tid >= kSumColumns)
    return 0.0f;
  sum = 0.0f;
  for (int run = 0; run < kSumRuns; ++run)
    sum += runs[run * kSumColumns + tid];
  return sum;
}

// Sums value[i] over the lanes whose numbers differ in the bits HIGH, HIGH / 2, ..., LOW. At each bit a lane gives away half
// of the values that it holds, until one is left, which further bits add in full. It ends with COUNT / lanes sums, or one,
// at the front of `value`. Returns the index of the first.
template <int HIGH, int LOW, int COUNT> VIM_DEVICE int reduce_scatter(float (&value)[COUNT], int lane) {
  int first = 0;
  int keep = COUNT;
#pragma unroll
  for (int mask = HIGH; mask >= LOW; mask /= 2) {
    if (keep == 1) {
      value[0] += __shfl_xor_sync(0xffffffffu, value[0], mask);
      continue;
    }
    keep /= 2;
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      if (i >= keep)
        break;
      const float give = upper ? value[i] : value[i + keep];
      const float own = upper ? value[i + keep] : value[i];
      value[i] = own + __shfl_xor_sync(0xffffffffu, give, mask);
    }
    if (upper)
      first += keep;
  }
  return first;
}

}  // namespace vim
