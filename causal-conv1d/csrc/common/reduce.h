// Sums over rows of partial results, in a fixed order.
#pragma once

#include "common/elements.h"

namespace vim {

constexpr int kSumThreads = 256;
constexpr int kSumColumns = 32;  // of a block; its other threads take interleaved runs of rows
constexpr int kSumRuns = kSumThreads / kSumColumns;

// For each of the block's columns: eight interleaved runs of rows in order, then the eight in order. The sum is returned to
// the first kSumColumns threads; all threads of the block must call. Needs kSumThreads floats of shared memory.
VIM_DEVICE float sum_rows(const float* source, int64_t rows, int64_t stride, bool live) {
    float* runs = reinterpret_cast<float*>(vim_shared_memory);
    const int tid = threadIdx.x;
    float sum = 0.0f;
    if (live)
#pragma unroll 4
        for (int64_t row = tid / kSumColumns; row < rows; row += kSumRuns) sum += source[row * stride];
    runs[tid] = sum;
    __syncthreads();
    if (tid >= kSumColumns) return 0.0f;
    sum = 0.0f;
    for (int run = 0; run < kSumRuns; ++run) sum += runs[run * kSumColumns + tid];
    return sum;
}

}  // namespace vim
