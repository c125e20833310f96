// What a lane of scan_forward.cu and of scan_stream.cu computes alike: CPT neighbouring channels, NPL states of each.
#pragma once

#include "common/reduce.h"
#include "scan_walk.h"

namespace vim {

constexpr int kWarpColumns = 32 / kLanes;  // groups of CPT channels of a warp

// dt of a token and channel; zero past the end, where the state stays as it is.
VIM_DEVICE float step_of(float delta, float bias, int32_t with_softplus, bool inside) {
    const float raw = delta + bias;
    const float positive = softplus(raw);
    float dt = with_softplus != 0 ? positive : raw;
    if (!inside) dt = 0.0f;
    return dt;
}

// Turns the sums of four tokens over a lane's states into the output of one, that of token `part`, before the gate.
// `other` is what the other direction left.
template <int DIRECTIONS, int CPT, typename Inputs, typename Values>
VIM_DEVICE void sum_parts(float (&value)[CPT], float (&y)[CPT][kLanes], int part, const float (&skip)[CPT],
                          const Inputs& input, const Values& other) {
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        reduce_scatter<2 * kWarpColumns, kWarpColumns>(y[c], part * kWarpColumns);
        value[c] = fmaf(skip[c], input[c], y[c][0]);
        if (DIRECTIONS == 2) value[c] += other[c];
    }
}

template <typename T, int CPT>
VIM_DEVICE void store_pack(char* target, const float (&value)[CPT], float factor, bool store) {
    Pack<T, CPT> pack;
#pragma unroll
    for (int c = 0; c < CPT; ++c) pack.values[c] = from_float<T>(value[c] * factor);
    if (store) *reinterpret_cast<Pack<T, CPT>*>(target) = pack;
}

// Stores the output of a token: gated and scaled, with the caller's addend where there is one direction; or, unless
// `complete`, the plain sum for the other direction.
template <typename T, int DIRECTIONS, int CPT, typename Values>
VIM_DEVICE void store_output(char* out, const float (&value)[CPT], float scale, const Values& addend, bool complete,
                             bool store) {
    Pack<T, CPT> result;
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        const float scaled = value[c] * (complete ? scale : 1.0f);
        result.values[c] = from_float<T>(DIRECTIONS == 1 ? scaled + addend[c] : scaled);
    }
    if (store) *reinterpret_cast<Pack<T, CPT>*>(out) = result;
}

// The end of a lane's walk. With STATES_ONLY, what the chunk reaches from zero goes where the next chunk of the walk looks for
// the state that it enters with; else the last state goes to the caller.
template <bool STATES_ONLY, int NPL, int CPT, typename BoundaryRow>
VIM_DEVICE void leave(const ScanForwardArgs& args, const ScanDirection& direction, int direction_index,
                      const Walk& walk, int64_t batch, int dim, int channel, int part, int dstate, bool live,
                      const float (&state)[CPT][NPL], float (&step_sum)[CPT], const BoundaryRow& boundary_row) {
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        if (STATES_ONLY) {
            step_sum[c] += __shfl_xor_sync(0xffffffffu, step_sum[c], kWarpColumns);
            step_sum[c] += __shfl_xor_sync(0xffffffffu, step_sum[c], 2 * kWarpColumns);
        }
        if (!live) continue;
        if (STATES_ONLY) {
            if (part == 0)
                args.chunk_steps[((direction_index * args.batch + batch) * walk.chunks + walk.chunk) * dim + channel +
                                 c] = step_sum[c];
            const int next = walk.descending ? walk.tile_begin - 1 : walk.tile_end;
            if (next < 0 || next >= walk.total_tiles) continue;
#pragma unroll
            for (int n = 0; n < NPL; ++n) boundary_row(next, c)[n] = state[c][n];
        } else if (direction.last_state != nullptr &&
                   (walk.descending ? walk.tile_begin == 0 : walk.tile_end == walk.total_tiles)) {
#pragma unroll
            for (int n = 0; n < NPL; ++n)
                if (part * NPL + n < dstate)
                    direction.last_state[(batch * dim + channel + c) * dstate + part * NPL + n] = state[c][n];
        }
    }
}

}  // namespace vim
