// The forward scan of scan_stream.cu, as scan_forward.cu calls it.
#pragma once

#include "scan.h"

namespace vim {

constexpr int kStreamChannels = 32;  // of a block: what two channels a lane give

// Whether the sizes and strides suit it; `states_only` runs the first pass over a sequence that is cut in time.
bool stream_fits(const ScanForwardArgs& args);
int launch_stream(const ScanForwardArgs& args, bool states_only, dim3 grid, void* stream);

}  // namespace vim
