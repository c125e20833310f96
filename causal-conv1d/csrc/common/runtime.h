// What the kernels need from the machine: threads, scratch memory, and the instruction set to run.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace vim {

typedef void (*Task)(const void *args, int64_t index, int64_t worker);

// Runs task(args, i, worker) for i in [0, count) on at most `threads` threads; worker < threads. Which worker runs which
// index is not fixed, so a task may depend on its index only.
void parallel(int64_t count, int64_t threads, Task task, const void *args);

// How this thread's calls of `parallel` get their threads from now on: run(context, body, data, threads) calls body(data) on up
// to `threads` threads and returns when all have; null restores the default.
typedef void (*Runner)(void *context, void (*body)(void *), void *data, int64_t threads);
void use_runner(Runner run, void *context);

// Memory of the calling thread, at least `bytes`, aligned to 64, kept between calls so that pages are touched once.
// Each slot (0 to 3) is one buffer; its content is lost when the slot is asked for again.
void *scratch(int slot, size_t bytes);

// 0 baseline, 1 AVX2 with FMA, 2 AVX-512: the best one of this machine, or the one that VIM_CPU_ISA forces. Negative: an error.
int isa();

}  // namespace vim
