// Selective scan on the GPU: arguments of the C interface (mirrored by ctypes in selective_scan/cuda.py) and launch arithmetic.
//
// Token-major tensors (batch, token, channel) with channel stride 1; other strides are free, in elements. Tokens are cut
// into tiles of kTile; tile j holds tokens [16 j, 16 j + 16) in either direction of the scan, and boundary state j is the
// state on entering tile j in the direction of the scan.
#pragma once

#include "common/math.h"
#include "common/reduce.h"

namespace vim {

constexpr int kTile = 16;  // tokens per tile
constexpr int kDirectionThreads = 64;  // forward scan: threads per direction in a block
constexpr int kLanes = 4;  // forward scan: lanes that share a channel, and tokens that they take at a time
constexpr int kForwardWarps =
    16;  // forward scan: that a multiprocessor is to hold, which bounds the registers of a thread
constexpr int kStatesPerThread = 4;  // backward scan: states per thread; 4, 8 or 16 neighbouring lanes share a channel
constexpr int kBackwardWarps = 6;  // backward scan: of a block, each with 32 / lanes channels of its own
constexpr int kBackwardBlocks =
    2;  // backward scan: that a multiprocessor is to hold, which bounds the registers of a thread
constexpr int kBackwardThreads = kBackwardWarps * 32;

// What differs between the two directions of a bidirectional mixer.
struct ScanDirection {
    const void* u;
    const void* delta;
    const void* B;
    const void* C;
    const float* A;  // (dim, dstate)
    const float* D;  // (dim) or null
    const float* delta_bias;  // (dim) or null
    const float* initial_state;  // (batch, dim, dstate) or null
    float* last_state;  // (batch, dim, dstate) or null
    float* boundaries;  // (batch, tiles, dim, padded states): written if save, read if resume; or null
    int64_t u_batch, u_token;
    int64_t delta_batch, delta_token;
    int64_t B_batch, B_token, B_group;
    int64_t C_batch, C_token, C_group;
    int32_t reverse;
    int32_t reserved;
};

struct ScanForwardArgs {
    ScanDirection direction[2];
    const void* z;  // gate or null
    const void* addend;  // added to the output, or null
    void* out;
    void* ungated;  // (batch, seqlen, dim) contiguous or null: scale * (y_0 + y_1), for the gradient of z
    float* chunk_steps;  // (directions, batch, chunks, dim): sum of dt over each chunk, long-sequence variant only
    int64_t z_batch, z_token, addend_batch, addend_token, out_batch, out_token;
    int64_t batch, seqlen, dim;
    int32_t dstate, groups;
    int32_t directions;  // 1, or 2: out = scale * (y_0 + y_1) * silu(z)
    int32_t type;  // of u, delta, B, C, z, addend and out
    int32_t softplus;
    int32_t chunk_tiles;  // tiles per chunk of time, 0: the whole sequence in one block
    int32_t save;  // write the boundary state of every tile
    float scale;
};

// One direction's gradients.
struct ScanBackwardDirection {
    ScanDirection in;  // boundaries are those of the forward scan; initial_state and last_state are not read
    void* du;  // (batch, seqlen, dim) contiguous, as ddelta
    void* ddelta;
    void* dB;  // (batch, seqlen, groups, dstate), strides dbc_token and dbc_group; a batch row is seqlen tokens
    void* dC;
    float* dA;  // (dim, dstate)
    float* dD;  // (dim) or null
    float* ddelta_bias;  // (dim) or null
    float* dinitial_state;  // (batch, dim, dstate) or null
    const float* dlast_state;  // (batch, dim, dstate) or null
};

struct ScanBackwardArgs {
    ScanBackwardDirection direction[2];
    const void* z;  // gate or null
    const void*
        ungated;  // (batch, seqlen, dim) contiguous: what the forward scan multiplied by the gate; null exactly if z is
    const void* dout;
    void* dz;  // null exactly if z is null
    float* workspace;  // vim_scan_backward_workspace() floats
    int64_t z_batch, z_token, dout_batch, dout_token, dz_batch, dz_token;
    int64_t dbc_token, dbc_group;
    int64_t batch, seqlen, dim;
    int32_t dstate, groups;
    int32_t directions;  // 1, or 2 whose outputs were added before the gate
    int32_t type;  // of all that is not float
    int32_t softplus;
    int32_t chunk_tiles;  // tiles per chunk of time, 0: the whole sequence in one block
    float scale;
    int32_t reserved;
};

VIM_HD constexpr int padded_states(int dstate) { return dstate <= 16 ? 16 : dstate <= 32 ? 32 : 64; }

// Blocks along the channels of the forward scan.
constexpr int64_t forward_blocks(int64_t dim, int64_t groups, int channels_per_lane) {
    return groups * ceil_div(dim / groups, kDirectionThreads / kLanes * channels_per_lane);
}

}  // namespace vim
