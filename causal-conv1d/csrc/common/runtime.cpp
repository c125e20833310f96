#include "common/runtime.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <thread>
#include <vector>

#ifndef VIM_X86
#define VIM_X86 0
#endif

#if VIM_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace vim {
namespace {

// Treats subnormal numbers as zero while it lives. A state that decays to nothing, or a gradient times such a decay,
// would otherwise cost a hundred times an ordinary number, for values below 1e-38.
struct FlushSubnormals {
#if VIM_X86
  unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040u); }  // flush to zero, denormals are zero
  ~FlushSubnormals() { _mm_setcsr(before); }
#endif
};

// Entry point of the OpenMP runtime that torch has loaded, handed over by the Python side. Calling it by pointer
// means that whatever compiler built this library, its loops run on torch's threads and never start a second pool.
typedef void (*GompParallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

std::atomic<GompParallel> gomp_parallel{nullptr};

thread_local Runner runner = nullptr;
thread_local void *runner_context = nullptr;

struct Job {
  Task task;
  const void *args;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> workers{0};
};

void work(void *data) {
  Job &job = *static_cast<Job *>(data);
  const FlushSubnormals mode;
  const int64_t worker = job.workers.fetch_add(1, std::memory_order_relaxed);
  for (;;) {
    const int64_t i = job.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= job.count)
      return;
    job.task(job.args, i, worker);
  }
}

#ifdef _WIN32
void *allocate(size_t bytes) { return _aligned_malloc(bytes, 64); }
void release(void *memory) { _aligned_free(memory); }
#else
void *allocate(size_t bytes) {
  void *memory = nullptr;
  return posix_memalign(&memory, 64, bytes) == 0 ? memory : nullptr;
}
void release(void *memory) { free(memory); }
#endif

#if VIM_X86
// What the processor has and the system saves at a switch of threads, asked for directly: not every compiler's runtime
// has what __builtin_cpu_supports needs, and it then answers that there is nothing.
int best_isa() {
  unsigned a, b, c, d;
  constexpr unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c))
    return 0;
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  if ((saved & 0x06u) != 0x06u || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2))
    return 0;
  return (saved & 0xe6u) == 0xe6u && (b & avx512) == avx512 ? 2 : 1;
}
#else
int best_isa() { return 0; }
#endif

struct Buffers {
  void *data[4] = {};
  size_t bytes[4] = {};
  ~Buffers() {
    for (void *p : data)
      release(p);
  }
};

}  // namespace

void parallel(int64_t count, int64_t threads, Task task, const void *args) {
  if (threads > count)
    threads = count;
  if (threads <= 1) {
    const FlushSubnormals mode;
    for (int64_t i = 0; i < count; ++i)
      task(args, i, 0);
    return;
  }
  Job job;
  job.task = task;
  job.args = args;
  job.count = count;
  if (runner) {
    runner(runner_context, work, &job, threads);
    return;
  }
  if (GompParallel run = gomp_parallel.load(std::memory_order_acquire)) {
    run(work, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < threads; ++i)
    pool.emplace_back(work, &job);
  work(&job);
  for (std::thread &t : pool)
    t.join();
}

void use_runner(Runner run, void *context) {
  runner = run;
  runner_context = context;
}

void *scratch(int slot, size_t bytes) {
  thread_local Buffers buffers;
  if (buffers.bytes[slot] < bytes) {
    release(buffers.data[slot]);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffers.data[slot] = allocate(rounded);
    if (buffers.data[slot] == nullptr)
      abort();
    buffers.bytes[slot] = rounded;
  }
  return buffers.data[slot];
}

int isa() {
  static const int chosen = [] {
    const int best = best_isa();
    const char *forced = getenv("VIM_CPU_ISA");
    if (forced == nullptr || *forced == 0)
      return best;
    const char *names[] = {"baseline", "avx2", "avx512"};
    for (int i = 0; i < 3; ++i)
      if (strcmp(forced, names[i]) == 0)
        return i <= best ? i : -1;
    return -2;
  }();
  return chosen;
}

}  // namespace vim

extern "C" {

// 0, 1 or 2 as in vim::isa; -1: VIM_CPU_ISA asks for more than this machine has; -2: it holds an unknown name.
__attribute__((visibility("default"))) int64_t vim_isa() { return vim::isa(); }

__attribute__((visibility("default"))) void vim_use_openmp(void *parallel) {
  vim::gomp_parallel.store(reinterpret_cast<vim::GompParallel>(parallel), std::memory_order_release);
}

}  // extern "C"
