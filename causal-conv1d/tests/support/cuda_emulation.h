// CUDA on the CPU: kernel sources compile against this with a C++17 compiler, included by common/launch.h.
//
// Each thread of a block is a coroutine; blocks run one after another. Barriers and warp shuffles switch coroutines, shared
// memory starts as NaN, and VIM_EMULATE_REVERSED=1 runs the threads in the opposite order, so that a missing barrier changes
// a result. It says nothing about speed.
#pragma once

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

struct float2 {
    float x, y;
};
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

namespace vim::emulation {

// The values of all lanes of this thread's warp.
inline void gather(float value, float (&all)[32]) {
    Warp& warp = block->warps[block->current / 32];
    float* slots = warp.slots[warp.generation & 1];  // two sets: a late lane still reads while an early one writes on
    slots[block->current % 32] = value;
    barrier(warp.arrived, warp.generation, 32);
    std::memcpy(all, slots, sizeof all);
}

}  // namespace vim::emulation

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    float all[32];
    vim::emulation::gather(value, all);
    return all[vim::emulation::block->current % 32 ^ mask];
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
