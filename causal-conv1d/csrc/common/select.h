// Exports a kernel that was compiled once per instruction set as the C function vim_<name>.
#pragma once

#include "common/runtime.h"

#if VIM_X86
#define VIM_DECLARE(name, Args)                \
  namespace baseline { extern void (*name)(const Args *); } \
  namespace avx2 { extern void (*name)(const Args *); }     \
  namespace avx512 { extern void (*name)(const Args *); }
#define VIM_EXPORT(name, Args)                                                                   \
  __attribute__((visibility("default"))) void vim_##name(const Args *args) {                      \
    const int isa = vim::isa();                                                                  \
    (isa == 2 ? avx512::name : isa == 1 ? avx2::name : baseline::name)(args);                    \
  }
#else
#define VIM_DECLARE(name, Args) \
  namespace baseline { extern void (*name)(const Args *); }
#define VIM_EXPORT(name, Args) \
  __attribute__((visibility("default"))) void vim_##name(const Args *args) { baseline::name(args); }
#endif
