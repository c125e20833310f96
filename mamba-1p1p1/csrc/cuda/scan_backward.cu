// Selective scan, backward: time runs against the scan, one tile of 16 tokens after another.
//
// A block owns some channels of one batch row; STATES / 4 neighbouring lanes share a channel with four states each. For each
// tile the block first does what is per (token, channel) with coalesced loads (step, gate and its slope into shared memory),
// then every thread recomputes its states over the tile from the saved boundary, walks back, and leaves partial sums: over
// its states (for du, ddelta, dz) and, through shuffles, over the channels of its warp (for dB, dC). All sums end in fixed
// order: warps of the block here, blocks and batch rows in the kernels below. Tokens past the end have step, input and
// output gradient zero, which changes neither state.
#include <initializer_list>

#include "scan.h"

namespace vim {
namespace {

// Sums eight values over the lanes that differ in the bits of `mask` = LOW, 2 LOW, ..., 16, halving what a lane keeps at
// each step: afterwards lane `l` holds 8 / lanes values (or one, over any further lanes added in full). Returns the index
// of the first value kept.
template <int LOW>
VIM_DEVICE int reduce_scatter(float (&value)[8], int lane) {
    int first = 0;
    int keep = 8;
#pragma unroll
    for (int mask = 16; mask >= LOW; mask /= 2) {
        if (keep == 1) {
            value[0] += __shfl_xor_sync(0xffffffffu, value[0], mask);
            continue;
        }
        keep /= 2;
        const bool upper = (lane & mask) != 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i >= keep) break;
            const float give = upper ? value[i] : value[i + keep];
            const float own = upper ? value[i + keep] : value[i];
            value[i] = own + __shfl_xor_sync(0xffffffffu, give, mask);
        }
        if (upper) first += keep;
    }
    return first;
}

template <typename T, int STATES>
__global__ void __launch_bounds__(kBackwardThreads) scan_backward_kernel(const ScanBackwardArgs args) {
    constexpr int kLanes = STATES / kStatesPerThread;      // that share a channel
    constexpr int kChannels = kBackwardThreads / kLanes;   // of the block
    constexpr int kRows = kLanes;                          // tokens that the block handles at once, per channel
    constexpr int kPasses = kTile / kRows;
    constexpr int kWarps = kBackwardThreads / 32;
    constexpr int kRow = 2 * STATES;                       // B | C of a token
    constexpr int kKept = kLanes == 4 ? 1 : kLanes == 8 ? 2 : 4;  // values a lane keeps of its eight: 8 / (32 / kLanes)
    constexpr int kStage = kTile * kRow / kBackwardThreads;

    float* shared = reinterpret_cast<float*>(vim_shared_memory);
    float* s_dt = shared;
    float* s_u = s_dt + kTile * kChannels;
    float* s_dy = s_u + kTile * kChannels;      // gradient of y + D u
    float* s_dz = s_dy + kTile * kChannels;     // dz = s_dz (y + D u)
    float* s_slope = s_dz + kTile * kChannels;  // d dt / d delta
    float* s_bc = s_slope + kTile * kChannels;
    float* s_part = s_bc + kTile * kRow;                  // [y | sum dh B | sum dh h decay A][token][thread]
    float* s_warp = s_part + 3 * kTile * kBackwardThreads;  // [warp][token][dB | dC]

    const ScanSide& side = args.side;
    const bool reverse = side.reverse != 0;
    const int tid = threadIdx.x;
    const int lane = tid % 32;
    const int warp = tid / 32;
    const int dim = static_cast<int>(args.dim);
    const int seqlen = static_cast<int>(args.seqlen);
    const int dstate = args.dstate;
    const int group_dim = dim / args.groups;
    const int channel_tiles = static_cast<int>(ceil_div(group_dim, kChannels));
    const int group = static_cast<int>(blockIdx.x) / channel_tiles;
    const int in_group = (static_cast<int>(blockIdx.x) % channel_tiles) * kChannels;
    const int64_t batch = blockIdx.y;
    const int tiles = static_cast<int>(ceil_div(seqlen, kTile));

    // Two views of the block: (row, column) for what is per (token, channel), (own, part) for what is per (channel, state).
    const int column = tid % kChannels;
    const int row = tid / kChannels;
    const bool column_live = in_group + column < group_dim;
    const int column_channel = group * group_dim + (column_live ? in_group + column : 0);
    const int own = tid / kLanes;
    const int part = tid % kLanes * kStatesPerThread;
    const bool own_live = in_group + own < group_dim;
    const int own_channel = group * group_dim + (own_live ? in_group + own : 0);

    auto at = [](int t, int64_t stride) { return static_cast<int64_t>(t) * static_cast<int>(stride); };
    const T* u = static_cast<const T*>(side.u) + batch * side.u_batch + column_channel;
    const T* delta = static_cast<const T*>(side.delta) + batch * side.delta_batch + column_channel;
    const T* dout = static_cast<const T*>(args.dout) + batch * args.dout_batch + column_channel;
    const T* z = args.z == nullptr ? nullptr : static_cast<const T*>(args.z) + batch * args.z_batch + column_channel;
    const T* B = static_cast<const T*>(side.B) + batch * side.B_batch + group * side.B_group;
    const T* C = static_cast<const T*>(side.C) + batch * side.C_batch + group * side.C_group;
    T* du = static_cast<T*>(args.du) + batch * seqlen * dim + column_channel;
    T* ddelta = static_cast<T*>(args.ddelta) + batch * seqlen * dim + column_channel;
    T* dz = args.dz == nullptr ? nullptr : static_cast<T*>(args.dz) + batch * args.dz_batch + column_channel;
    const float bias = side.delta_bias == nullptr ? 0.0f : side.delta_bias[column_channel];
    const float skip = side.D == nullptr ? 0.0f : side.D[column_channel];

    float rate[kStatesPerThread], adjoint[kStatesPerThread], dA[kStatesPerThread];
#pragma unroll
    for (int n = 0; n < kStatesPerThread; ++n) {
        const bool real = own_live && part + n < dstate;
        const int64_t index = (batch * dim + own_channel) * dstate + part + n;
        rate[n] = real ? side.A[own_channel * dstate + part + n] * kLog2E : 0.0f;
        adjoint[n] = real && args.dlast_state != nullptr ? args.dlast_state[index] : 0.0f;
        dA[n] = 0.0f;
    }
    float dD = 0.0f, dbias = 0.0f;

    auto tile_at = [&](int walked) { return reverse ? walked : tiles - 1 - walked; };
    // Place i of a tile in the order of the scan.
    auto token_at = [&](int tile, int i) { return tile * kTile + (reverse ? kTile - 1 - i : i); };

    T next_u[kPasses], next_delta[kPasses], next_dout[kPasses], next_z[kPasses], next_bc[kStage];
    auto fetch = [&](int tile) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int t = token_at(tile, pass * kRows + row);
            if (t >= seqlen || !column_live) continue;
            next_u[pass] = u[at(t, side.u_token)];
            next_delta[pass] = delta[at(t, side.delta_token)];
            next_dout[pass] = dout[at(t, args.dout_token)];
            if (z != nullptr) next_z[pass] = z[at(t, args.z_token)];
        }
#pragma unroll
        for (int k = 0; k < kStage; ++k) {
            const int index = k * kBackwardThreads + tid;
            const int n = index % STATES;
            const bool second = index / STATES % 2 != 0;
            const int t = token_at(tile, index / kRow);
            next_bc[k] = from_float<T>(0.0f);
            if (t < seqlen && n < dstate)
                next_bc[k] = second ? C[at(t, side.C_token) + n] : B[at(t, side.B_token) + n];
        }
    };

    fetch(tile_at(0));
    for (int walked = 0; walked < tiles; ++walked) {
        const int tile = tile_at(walked);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int i = pass * kRows + row;
            float dt = 0.0f, input = 0.0f, dy = 0.0f, gate_slope = 0.0f, slope = 0.0f;
            if (column_live && token_at(tile, i) < seqlen) {
                const float raw = to_float(next_delta[pass]) + bias;
                dt = args.softplus != 0 ? softplus(raw) : raw;
                slope = args.softplus != 0 ? sigmoid(raw) : 1.0f;
                input = to_float(next_u[pass]);
                dy = to_float(next_dout[pass]) * args.scale;
                if (z != nullptr) {
                    const float gate = to_float(next_z[pass]);
                    const float s = sigmoid(gate);
                    gate_slope = dy * silu_slope(gate, s);
                    dy *= gate * s;
                }
            }
            const int place = i * kChannels + column;
            s_dt[place] = dt;
            s_u[place] = input;
            s_dy[place] = dy;
            s_dz[place] = gate_slope;
            s_slope[place] = slope;
        }
#pragma unroll
        for (int k = 0; k < kStage; ++k) s_bc[k * kBackwardThreads + tid] = to_float(next_bc[k]);
        float entering[kStatesPerThread];
        {
            const float4 saved = *reinterpret_cast<const float4*>(
                side.boundaries + ((batch * tiles + tile) * dim + own_channel) * STATES + part);
            entering[0] = saved.x, entering[1] = saved.y, entering[2] = saved.z, entering[3] = saved.w;
        }
        __syncthreads();
        if (walked + 1 < tiles) fetch(tile_at(walked + 1));

        float history[kTile][kStatesPerThread];
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
            const float dt = s_dt[i * kChannels + own];
            const float dtu = dt * s_u[i * kChannels + own];
            const float4 b = *reinterpret_cast<const float4*>(s_bc + i * kRow + part);
            const float* before = i == 0 ? entering : history[i > 0 ? i - 1 : 0];
            history[i][0] = advance(before[0], dt, rate[0], dtu, b.x);
            history[i][1] = advance(before[1], dt, rate[1], dtu, b.y);
            history[i][2] = advance(before[2], dt, rate[2], dtu, b.z);
            history[i][3] = advance(before[3], dt, rate[3], dtu, b.w);
        }
#pragma unroll
        for (int i = kTile - 1; i >= 0; --i) {
            const float dt = s_dt[i * kChannels + own];
            const float dtu = dt * s_u[i * kChannels + own];
            const float dy = s_dy[i * kChannels + own];
            const float4 b4 = *reinterpret_cast<const float4*>(s_bc + i * kRow + part);
            const float4 c4 = *reinterpret_cast<const float4*>(s_bc + i * kRow + STATES + part);
            const float b[4] = {b4.x, b4.y, b4.z, b4.w};
            const float c[4] = {c4.x, c4.y, c4.z, c4.w};
            float y = 0.0f, input_sum = 0.0f, step_sum = 0.0f;
            float over_channels[8];
#pragma unroll
            for (int n = 0; n < kStatesPerThread; ++n) {
                const float before = i == 0 ? entering[n] : history[i > 0 ? i - 1 : 0][n];
                y = fmaf(c[n], history[i][n], y);
                adjoint[n] = fmaf(c[n], dy, adjoint[n]);
                over_channels[n] = adjoint[n] * dtu;
                over_channels[4 + n] = dy * history[i][n];
                input_sum = fmaf(adjoint[n], b[n], input_sum);
                adjoint[n] *= exp2_fast(dt * rate[n]);
                const float through = adjoint[n] * before;
                dA[n] = fmaf(through, dt, dA[n]);
                step_sum = fmaf(through, rate[n], step_sum);
            }
            s_part[(0 * kTile + i) * kBackwardThreads + tid] = y;
            s_part[(1 * kTile + i) * kBackwardThreads + tid] = input_sum;
            s_part[(2 * kTile + i) * kBackwardThreads + tid] = step_sum;
            const int first = reduce_scatter<kLanes>(over_channels, lane);
#pragma unroll
            for (int k = 0; k < kKept; ++k) {
                const int index = first + k;  // 0-3: dB of states part + index; 4-7: dC
                s_warp[(warp * kTile + i) * kRow + (index / 4) * STATES + part + index % 4] = over_channels[k];
            }
        }
        __syncthreads();

#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int i = pass * kRows + row;
            const int t = token_at(tile, i);
            if (t >= seqlen || !column_live) continue;
            float y = 0.0f, input_sum = 0.0f, step_sum = 0.0f;
#pragma unroll
            for (int k = 0; k < kLanes; ++k) {
                y += s_part[(0 * kTile + i) * kBackwardThreads + column * kLanes + k];
                input_sum += s_part[(1 * kTile + i) * kBackwardThreads + column * kLanes + k];
                step_sum += s_part[(2 * kTile + i) * kBackwardThreads + column * kLanes + k];
            }
            const int place = i * kChannels + column;
            const float input = s_u[place], dy = s_dy[place];
            // rate is A log2 e, and the derivative of exp(dt A) by dt needs A.
            const float ddt = fmaf(step_sum, 1.0f / kLog2E, input * input_sum) * s_slope[place];
            du[at(t, dim)] = from_float<T>(fmaf(s_dt[place], input_sum, skip * dy));
            ddelta[at(t, dim)] = from_float<T>(ddt);
            dD = fmaf(dy, input, dD);
            dbias += ddt;
            if (dz != nullptr) {
                float value = s_dz[place] * fmaf(skip, input, y);
                T* target = dz + at(t, args.dz_token);
                if (args.accumulate_dz != 0) value += to_float(*target);
                *target = from_float<T>(value);
            }
        }
        for (int index = tid; index < kTile * kRow; index += kBackwardThreads) {
            const int t = token_at(tile, index / kRow);
            if (t >= seqlen) continue;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += s_warp[w * kTile * kRow + index];
            args.workspace[((blockIdx.x * args.batch + batch) * seqlen + t) * kRow + index % kRow] = sum;
        }
        // The next tile's first writes touch only places that this thread read itself, or that were last read before the
        // barrier above; s_part and s_warp are written again only after the next barrier.
    }

    const BackwardPlan plan = backward_plan(args.batch, args.seqlen, args.dim, dstate, args.groups);
    float* partial_dA = args.workspace + plan.bc_floats;
    float* partial_channel = partial_dA + plan.dA_floats;
#pragma unroll
    for (int n = 0; n < kStatesPerThread; ++n) {
        if (!own_live || part + n >= dstate) continue;
        const int64_t index = (batch * dim + own_channel) * dstate + part + n;
        partial_dA[index] = dA[n];
        if (args.dinitial_state != nullptr) args.dinitial_state[index] = adjoint[n];
    }
    __syncthreads();  // s_dt and s_u become scratch
    s_dt[tid] = dD;
    s_u[tid] = dbias;
    __syncthreads();
    if (row == 0 && column_live) {
        float total_dD = 0.0f, total_dbias = 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            total_dD += s_dt[r * kChannels + column];
            total_dbias += s_u[r * kChannels + column];
        }
        partial_channel[(batch * 2 + 0) * dim + column_channel] = total_dD;
        partial_channel[(batch * 2 + 1) * dim + column_channel] = total_dbias;
    }
}

// dB and dC: the sum over the channel tiles of each group, in order, in the inputs' type.
template <typename T>
__global__ void __launch_bounds__(256) finish_bc_kernel(const ScanBackwardArgs args) {
    const int states = padded_states(args.dstate);
    const int64_t rows = args.batch * args.seqlen;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= rows * 2 * states) return;
    const int64_t group = blockIdx.y;
    const int column = static_cast<int>(index % (2 * states));
    const int n = column % states;
    if (n >= args.dstate) return;
    const int64_t tiles = backward_plan(args.batch, args.seqlen, args.dim, args.dstate, args.groups).tiles;
    const float* partial = args.workspace + group * tiles * rows * 2 * states + index;
    float sum = 0.0f;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += partial[tile * rows * 2 * states];
    T* target = static_cast<T*>(column < states ? args.dB : args.dC);
    target[index / (2 * states) * args.dbc_token + group * args.dbc_group + n] = from_float<T>(sum);
}

// dA, dD and ddelta_bias: sums over the batch.
__global__ void __launch_bounds__(kSumThreads) finish_parameters_kernel(const ScanBackwardArgs args) {
    const BackwardPlan plan = backward_plan(args.batch, args.seqlen, args.dim, args.dstate, args.groups);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
    const int64_t matrix = args.dim * args.dstate;
    const bool live = index < matrix + 2 * args.dim;
    const bool in_matrix = index < matrix;
    const int64_t stride = in_matrix ? matrix : 2 * args.dim;
    const int64_t place = in_matrix ? index : index - matrix;
    const float* partial = args.workspace + plan.bc_floats + (in_matrix ? 0 : plan.dA_floats) + place;
    const float sum = sum_rows(partial, args.batch, stride, live);
    if (threadIdx.x >= kSumColumns || !live) return;
    float* target = in_matrix ? args.dA : place < args.dim ? args.dD : args.ddelta_bias;
    if (target != nullptr) target[!in_matrix && place >= args.dim ? place - args.dim : place] = sum;
}

template <typename T, int STATES>
int launch_backward(const ScanBackwardArgs& args, void* stream) {
    const BackwardPlan plan = backward_plan(args.batch, args.seqlen, args.dim, args.dstate, args.groups);
    const dim3 grid(static_cast<unsigned>(plan.tiles * args.groups), static_cast<unsigned>(args.batch));
    const size_t shared = sizeof(float) * backward_shared_floats(STATES);
    int status = launch(scan_backward_kernel<T, STATES>, grid, kBackwardThreads, shared, stream, args);
    if (status != kOk) return status;
    const dim3 bc_grid(static_cast<unsigned>(ceil_div(args.batch * args.seqlen * 2 * STATES, 256)),
                       static_cast<unsigned>(args.groups));
    status = launch(finish_bc_kernel<T>, bc_grid, 256, 0, stream, args);
    if (status != kOk) return status;
    const dim3 parameter_grid(static_cast<unsigned>(ceil_div(args.dim * (args.dstate + 2), kSumColumns)));
    return launch(finish_parameters_kernel, parameter_grid, kSumThreads, kSumThreads * sizeof(float), stream, args);
}

template <typename T>
int dispatch(const ScanBackwardArgs& args, void* stream) {
    switch (padded_states(args.dstate)) {
        case 16:
            return launch_backward<T, 16>(args, stream);
        case 32:
            return launch_backward<T, 32>(args, stream);
        default:
            return launch_backward<T, 64>(args, stream);
    }
}

}  // namespace
}  // namespace vim

extern "C" int vim_scan_backward(const vim::ScanBackwardArgs* args, void* stream) {
    using namespace vim;
    if (args->dstate < 1 || args->dstate > 64 || args->groups < 1 || args->dim % args->groups != 0) return kUnsupported;
    int64_t limit = args->seqlen > args->dim * 64 ? args->seqlen : args->dim * 64;
    for (int64_t stride : {args->side.u_token, args->side.delta_token, args->side.B_token, args->side.C_token,
                           args->z_token, args->dout_token, args->dz_token})
        limit = limit > stride ? limit : stride;
    if (limit >= (int64_t{1} << 31) || args->batch >= 65536) return kUnsupported;
    if (args->type == kFloat32) return dispatch<float>(*args, stream);
    if (args->type == kBFloat16) return dispatch<BFloat16>(*args, stream);
    if (args->type == kFloat16) return dispatch<Float16>(*args, stream);
    return kUnsupported;
}

// Floats of scratch memory that vim_scan_backward needs.
extern "C" int64_t vim_scan_backward_workspace(int64_t batch, int64_t seqlen, int64_t dim, int32_t dstate, int32_t groups) {
    const vim::BackwardPlan plan = vim::backward_plan(batch, seqlen, dim, dstate, groups);
    return plan.bc_floats + plan.dA_floats + plan.channel_floats;
}

extern "C" int64_t vim_scan_backward_shared_bytes(int32_t dstate) {
    return static_cast<int64_t>(sizeof(float)) * vim::backward_shared_floats(vim::padded_states(dstate));
}
