// The workspace of the backward scan, and the launches that scan_backward.cu leaves to scan_backward_finish.cu.
#pragma once

#include "scan.h"

namespace vim {

VIM_HD constexpr int backward_channels(int states) {
    return kBackwardWarps * 32 * kStatesPerThread / states;  // of a block
}

// Where a direction's partial sums lie in the workspace of the backward scan, in floats.
struct BackwardPlan {
    int64_t blocks;    // of channels, in one group
    int64_t chunks;    // of time
    int64_t adjoints;  // (batch, chunks, dim, padded states): adjoint on entering a chunk; none if there is one chunk
    int64_t bc;  // partial dB and dC: (groups * blocks, batch, seqlen, 2, padded states)
    int64_t dA;  // partial dA: (batch * chunks, dim, dstate)
    int64_t channel;  // partial dD and ddelta_bias: (batch * chunks, 2, dim)
    int64_t steps;  // (batch, chunks, dim): sum of dt over a chunk; none if there is one chunk
    int64_t floats;  // of a direction
};

VIM_HD constexpr BackwardPlan backward_plan(int64_t batch, int64_t seqlen, int64_t dim, int dstate, int groups,
                                            int chunk_tiles) {
    const int64_t states = padded_states(dstate), tiles = ceil_div(seqlen, kTile);
    BackwardPlan plan{};
    plan.blocks = ceil_div(dim / groups, backward_channels(static_cast<int>(states)));
    plan.chunks = chunk_tiles > 0 ? ceil_div(tiles, chunk_tiles) : 1;
    const int64_t rows = batch * plan.chunks * dim, cut = plan.chunks > 1 ? 1 : 0;
    plan.adjoints = 0;
    plan.bc = plan.adjoints + cut * rows * states;
    plan.dA = plan.bc + groups * plan.blocks * batch * seqlen * 2 * states;
    plan.channel = plan.dA + rows * dstate;
    plan.steps = plan.channel + 2 * rows;
    plan.floats = ceil_div(plan.steps + cut * rows, 4) * 4;  // a multiple of 16 bytes, as rows of dB and dC are
    return plan;
}

VIM_HD constexpr BackwardPlan plan_of(const ScanBackwardArgs& args) {
    return backward_plan(args.batch, args.seqlen, args.dim, args.dstate, args.groups, args.chunk_tiles);
}

// Between the two passes over a sequence that is cut in time: what each chunk adds to the adjoint from zero becomes the adjoint
// on entering it.
int join_adjoints(const ScanBackwardArgs& args, void* stream);

// After the scan: its partial sums become the gradients of B, C, A, D and delta_bias.
int finish_gradients(const ScanBackwardArgs& args, void* stream);

}  // namespace vim
