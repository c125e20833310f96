// CUDA, or an emulation of it on the CPU: the same kernel source compiles with nvcc and with a C++17 compiler.
//
// Under a C++ compiler each thread of a block is a coroutine; blocks run one after another. Barriers and warp shuffles
// switch coroutines, shared memory starts as NaN, and VIM_EMULATE_REVERSED=1 runs the threads in the opposite order, so
// that a missing barrier changes a result. That is what the CPU tests run; it says nothing about speed.
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
template <int ID, int THREADS>
VIM_DEVICE void sync_part() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, void* stream, const Args& args) {
    if (shared_bytes > 48 * 1024) {
        // Above 48 KiB a kernel has to ask. The attribute is per device, so it is set at every launch: it is cheap.
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
    return cudaGetLastError();
}

}  // namespace vim

#else

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#define VIM_HD inline
#define VIM_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace vim::emulation {

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
};

struct Warp {
    float slots[2][32];
    int arrived = 0;
    unsigned generation = 0;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<float4> shared;
    ucontext_t scheduler;
    int current = 0;
    int arrived = 0;
    unsigned generation = 0;
    int part_arrived[16] = {};
    unsigned part_generation[16] = {};
    void (*entry)(const void*) = nullptr;
    const void* argument = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local dim3 block_index, grid_size, block_size;

struct ThreadIndex {
    struct X {
        operator int() const { return block->current; }
    } x;
};
struct Index {
    struct X {
        operator unsigned() const { return block_index.x; }
    } x;
    struct Y {
        operator unsigned() const { return block_index.y; }
    } y;
    struct Z {
        operator unsigned() const { return block_index.z; }
    } z;
};

inline void yield_to_scheduler() {
    Thread& thread = block->threads[block->current];
    swapcontext(&thread.context, &block->scheduler);
}

inline void barrier(int& arrived, unsigned& generation, int expected) {
    unsigned mine = generation;
    if (++arrived == expected) {
        arrived = 0;
        ++generation;
        return;
    }
    while (generation == mine) yield_to_scheduler();
}

inline void thread_main() {
    block->entry(block->argument);
    block->threads[block->current].done = true;
    yield_to_scheduler();
}

inline void run_block() {
    int count = static_cast<int>(block->threads.size());
    const char* order = std::getenv("VIM_EMULATE_REVERSED");
    bool reversed = order != nullptr && order[0] == '1';
    for (Thread& thread : block->threads) {
        getcontext(&thread.context);
        thread.done = false;
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, thread_main, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (int i = 0; i < count; ++i) {
            block->current = reversed ? count - 1 - i : i;
            Thread& thread = block->threads[block->current];
            if (thread.done) continue;
            alive = true;
            swapcontext(&block->scheduler, &thread.context);
        }
    }
}

template <typename Args>
struct Call {
    void (*kernel)(Args);
    const Args* args;
};

template <typename Args>
void enter(const void* call) {
    auto* typed = static_cast<const Call<Args>*>(call);
    typed->kernel(*typed->args);
}

}  // namespace vim::emulation

inline vim::emulation::ThreadIndex threadIdx;
inline vim::emulation::Index blockIdx;
#define vim_shared_memory (vim::emulation::block->shared.data())

inline void __syncthreads() {
    auto* block = vim::emulation::block;
    vim::emulation::barrier(block->arrived, block->generation, static_cast<int>(block->threads.size()));
}

inline void __syncwarp() {
    auto* block = vim::emulation::block;
    vim::emulation::Warp& warp = block->warps[block->current / 32];
    vim::emulation::barrier(warp.arrived, warp.generation, 32);
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    auto* block = vim::emulation::block;
    vim::emulation::Warp& warp = block->warps[block->current / 32];
    int lane = block->current % 32;
    float* slots = warp.slots[warp.generation & 1];  // two sets: a late lane still reads while an early one writes on
    slots[lane] = value;
    vim::emulation::barrier(warp.arrived, warp.generation, 32);
    return slots[lane ^ mask];
}

namespace vim {

template <int ID, int THREADS>
inline void sync_part() {
    auto* block = emulation::block;
    emulation::barrier(block->part_arrived[ID], block->part_generation[ID], THREADS);
}

template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, void*, const Args& args) {
    emulation::Block block;
    block.threads.resize(threads);
    for (auto& thread : block.threads) thread.stack.resize(64 * 1024);
    block.warps.resize((threads + 31) / 32);
    emulation::Call<Args> call{kernel, &args};
    block.entry = emulation::enter<Args>;
    block.argument = &call;
    emulation::block = &block;
    emulation::grid_size = grid;
    emulation::block_size = dim3(threads);
    float nan = std::numeric_limits<float>::quiet_NaN();
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                emulation::block_index = dim3(x, y, z);
                block.shared.assign((shared_bytes + 15) / 16, float4{nan, nan, nan, nan});
                emulation::run_block();
            }
    emulation::block = nullptr;
    return 0;
}

}  // namespace vim

#endif

namespace vim {

// Element types by the code that the Python side passes.
enum DataType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
// Returned besides CUDA's own error codes (which are positive).
enum Status : int { kOk = 0, kUnsupported = -1 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

VIM_HD float to_float(float value) { return value; }

VIM_HD float to_float(BFloat16 value) {
    union {
        uint32_t bits;
        float number;
    } cast;
    cast.bits = static_cast<uint32_t>(value.bits) << 16;
    return cast.number;
}

VIM_HD float to_float(Float16 value) {
#ifdef __CUDACC__
    return __half2float(__half(__half_raw{value.bits}));
#else
    _Float16 half;
    std::memcpy(&half, &value.bits, 2);
    return static_cast<float>(half);
#endif
}

template <typename T>
VIM_HD T from_float(float value);

template <>
VIM_HD float from_float<float>(float value) {
    return value;
}

template <>
VIM_HD BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDACC__
    return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return BFloat16{0x7fff};
    return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
VIM_HD Float16 from_float<Float16>(float value) {
#ifdef __CUDACC__
    return Float16{__half_as_ushort(__float2half_rn(value))};
#else
    _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return Float16{bits};
#endif
}

// COUNT neighbouring elements as one load or store.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T values[COUNT];
};

// An element of a tensor whose type is known only at run time (tiles of B and C: few loads, so no template for them).
VIM_HD float load_any(const void* data, int64_t index, int32_t type) {
    if (type == kFloat32) return static_cast<const float*>(data)[index];
    if (type == kBFloat16) return to_float(static_cast<const BFloat16*>(data)[index]);
    return to_float(static_cast<const Float16*>(data)[index]);
}

VIM_HD void store_any(void* data, int64_t index, int32_t type, float value) {
    if (type == kFloat32)
        static_cast<float*>(data)[index] = value;
    else if (type == kBFloat16)
        static_cast<BFloat16*>(data)[index] = from_float<BFloat16>(value);
    else
        static_cast<Float16*>(data)[index] = from_float<Float16>(value);
}

VIM_HD constexpr int64_t ceil_div(int64_t count, int64_t step) { return (count + step - 1) / step; }

}  // namespace vim
