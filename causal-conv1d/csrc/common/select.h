// Exports a kernel that was compiled once per instruction set as the C function vim_<name>, and the size of its arguments in
// bytes, which the Python side compares with its own, as vim_<name>_size.
#pragma once

#include "common/runtime.h"

#if VIM_X86
#define VIM_DECLARE(name, Args)                                                                                        \
  namespace baseline {                                                                                                 \
  extern void (*name)(const Args *);                                                                                   \
  }                                                                                                                    \
  namespace avx2 {                                                                                                     \
  extern void (*name)(const Args *);                                                                                   \
  }                                                                                                                    \
  namespace avx512 {                                                                                                   \
  extern void (*name)(const Args *);                                                                                   \
  }
#define VIM_BEST(name) (vim::isa() == 2 ? avx512::name : vim::isa() == 1 ? avx2::name : baseline::name)
#else
#define VIM_DECLARE(name, Args)                                                                                        \
  namespace baseline {                                                                                                 \
  extern void (*name)(const Args *);                                                                                   \
  }
#define VIM_BEST(name) baseline::name
#endif

#define VIM_EXPORT(name, Args)                                                                                         \
  __attribute__((visibility("default"))) void vim_##name(const Args *args) { VIM_BEST(name)(args); }                   \
  __attribute__((visibility("default"))) int64_t vim_##name##_size() { return sizeof(Args); }
