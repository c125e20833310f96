// What a kernel source needs of CUDA: qualifiers, shared memory, barriers and the launch. Without nvcc the same sources compile
// against the tests' stand-in for CUDA on the CPU, causal-conv1d/tests/support/cuda_emulation.h.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define VIM_HD __host__ __device__ __forceinline__
#define VIM_DEVICE __device__ __forceinline__

extern __shared__ float4 vim_shared_memory[];

namespace vim {

// A barrier among THREADS threads of a block, all that come with this ID (1 to 15).
template <int ID, int THREADS> VIM_DEVICE void sync_part() {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, void *stream, const Args &args) {
  if (shared_bytes > 48 * 1024) {
    // Above 48 KiB a kernel has to ask. The attribute is per device, so it is set at every launch: it is cheap.
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess)
      return error;
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace vim

#else
#include "cuda_emulation.h"
#endif

namespace vim {

// What a launcher returns besides CUDA's own error codes, which are positive.
enum Status : int { kOk = 0, kUnsupported = -1 };

}  // namespace vim
