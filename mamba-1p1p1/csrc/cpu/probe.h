// A measurement, not a kernel: the rate at which this machine multiplies and adds, for benchmarks/scan.py.
#pragma once

#include <stdint.h>

struct ProbeArgs {
  int64_t repeats;
  double *flops;  // out: multiplications and additions done, each counted once
};
