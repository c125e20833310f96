// Selective scan, backward: time runs against the scan, one tile of 16 tokens after another.
//
// STATES / 4 neighbouring lanes share a channel, with four states each; a warp has its own channels and a block several
// warps. Tiles of the inputs come in by asynchronous copies. For each tile every lane first does what is per (token,
// channel) for its share of the tokens and leaves it in shared memory, then recomputes its states over the tile from the
// saved boundary, keeps them in registers, and walks back. Sums over the states of a channel are reduce-scattered over its
// lanes, so that each lane finishes the tokens that it began with; du, ddelta and dz replace u, delta and z in the tile,
// which then goes out in whole rows. dB and dC, sums over channels, are formed by shuffles in a warp, then in a fixed order
// over the warps of the block; scan_backward_finish.cu adds up the blocks, and dA, dD and the bias over batch rows and chunks.
//
// Both directions of a mixer share a launch. A long sequence with few channels is cut in time: a first pass finds what each
// chunk adds to the adjoint state from zero, a second the adjoint on entering every chunk. Tokens past the end have step,
// input and output gradient zero, which changes neither state nor adjoint.
#include "async_copy.h"
#include "common/reduce.h"
#include "scan_backward.h"
#include "scan_walk.h"

namespace vim {
namespace {

template <typename T, int STATES>
struct BackwardShape {
    static constexpr int kLanes = STATES / kStatesPerThread;  // that share a channel
    static constexpr int kWarpChannels = 32 / kLanes;
    static constexpr int kChannels = kWarpChannels * kBackwardWarps;
    static constexpr int kSteps = kTile / kLanes;  // tokens of a tile that a lane begins and finishes
    static constexpr int kRow = 2 * STATES;  // B | C of a token
    static constexpr int kPitch = kChannels + 8;  // of a tile's rows: the lanes of a channel meet no bank twice
    static constexpr int kPieces = kChannels * static_cast<int>(sizeof(T)) / 16;  // of 16 bytes in an aligned row
};

template <typename T, int STATES>
struct BackwardTiles {
    using Shape = BackwardShape<T, STATES>;
    using Tile = T[kTile * Shape::kPitch];
    struct alignas(16) Inputs {
        Tile u, delta, dout, z, ungated;
    };
    Inputs inputs[2];
    float bc[2][kTile * Shape::kRow];
    // Of a token and channel, for each warp:
    float2 steps[kBackwardWarps][kTile * Shape::kWarpChannels];  // step * u, and step
    float gradients[kBackwardWarps][kTile * Shape::kWarpChannels];  // of y + D u
    float slopes[kBackwardWarps][kTile * Shape::kWarpChannels];  // d step / d delta
    float sums[kBackwardWarps][kTile * Shape::kRow];  // dB | dC over a warp's channels
};

// ALIGNED: tiles are copied 16 bytes at a time. ADJOINT_ONLY: the first pass over a sequence that is cut in time.
template <typename T, int STATES, bool ALIGNED, bool ADJOINT_ONLY>
__global__ void __launch_bounds__(kBackwardThreads, STATES == 16 ? kBackwardBlocks : 1)
    scan_backward_kernel(const ScanBackwardArgs args) {
    using Shape = BackwardShape<T, STATES>;
    constexpr int kLanes = Shape::kLanes, kWarpChannels = Shape::kWarpChannels, kChannels = Shape::kChannels;
    constexpr int kRow = Shape::kRow, kPitch = Shape::kPitch, kPieces = Shape::kPieces;
    constexpr int kStage = (kTile * kRow + kBackwardThreads - 1) / kBackwardThreads;
    auto& shared = *reinterpret_cast<BackwardTiles<T, STATES>*>(vim_shared_memory);

    const int direction_index = static_cast<int>(blockIdx.z) % args.directions;
    const int chunk = static_cast<int>(blockIdx.z) / args.directions;
    const ScanBackwardDirection& direction = args.direction[direction_index];
    const ScanDirection& in = direction.in;
    const bool reverse = in.reverse != 0;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int own = lane / kLanes, part = lane % kLanes;  // channel of the warp's, and which states of it
    const int dim = static_cast<int>(args.dim), seqlen = static_cast<int>(args.seqlen), dstate = args.dstate;
    const int group_dim = dim / args.groups;
    const int group_blocks = static_cast<int>(ceil_div(group_dim, kChannels));
    const int group = static_cast<int>(blockIdx.x) / group_blocks;
    const int in_group = static_cast<int>(blockIdx.x) % group_blocks * kChannels;
    const int first_channel = group * group_dim + in_group;
    const int live_channels = group_dim - in_group;  // of the block's, and possibly more
    const int column = warp * kWarpChannels + own;
    const bool live = column < live_channels;
    const int channel = live ? first_channel + column : 0;
    const int64_t batch = blockIdx.y;
    const bool gated = args.z != nullptr;
    const bool with_dz = gated && direction_index == 0 && !ADJOINT_ONLY;

    const Walk walk(args.seqlen, args.chunk_tiles, chunk, !reverse);
    const int chunks = walk.chunks, tiles = walk.total_tiles;
    // Place i of a tile in the order of the scan.
    auto token_at = [&](int tile, int i) { return tile * kTile + (reverse ? kTile - 1 - i : i); };

    const BackwardPlan plan = plan_of(args);
    float* workspace = args.workspace + direction_index * plan.floats;
    const int64_t chunk_row = (batch * chunks + chunk) * dim;

    auto row_of = [&](const void* data, int64_t batch_stride, int64_t token_stride, int t) {
        return static_cast<const T*>(data) + (batch * batch_stride + first_channel) +
               static_cast<int64_t>(t) * static_cast<int>(token_stride);
    };
    // Of an aligned tile this thread copies 16 bytes: from this channel of the block's on, in this row.
    const int piece_row = kPieces > 0 ? tid / kPieces : 0;
    const int piece = kPieces > 0 ? tid % kPieces * (16 / static_cast<int>(sizeof(T))) : 0;
    T next_bc[kStage];
    auto copy_tile = [&](int tile, int buffer) {
        auto& to = shared.inputs[buffer];
        auto bring = [&](T* target, const void* data, int64_t batch_stride, int64_t token_stride) {
            if constexpr (ALIGNED) {
                if (kTile * kPieces < kBackwardThreads && tid >= kTile * kPieces) return;
                const int t = token_at(tile, piece_row);
                const bool inside = t < seqlen && piece < live_channels;
                copy_async<16>(target + piece_row * kPitch + piece,
                               row_of(data, batch_stride, token_stride, inside ? t : 0) + (inside ? piece : 0), inside);
            } else {
#pragma unroll 1
                for (int index = tid; index < kTile * kChannels; index += kBackwardThreads) {
                    const int i = index / kChannels, c = index % kChannels;
                    const int t = token_at(tile, i);
                    target[i * kPitch + c] = t < seqlen && c < live_channels
                                                 ? row_of(data, batch_stride, token_stride, t)[c]
                                                 : from_float<T>(0.0f);
                }
            }
        };
        if (!ADJOINT_ONLY) bring(to.u, in.u, in.u_batch, in.u_token);
        bring(to.delta, in.delta, in.delta_batch, in.delta_token);
        bring(to.dout, args.dout, args.dout_batch, args.dout_token);
        if (gated) bring(to.z, args.z, args.z_batch, args.z_token);
        if (with_dz) bring(to.ungated, args.ungated, args.seqlen * args.dim, args.dim);
        const T* B = static_cast<const T*>(in.B) + batch * in.B_batch + group * in.B_group;
        const T* C = static_cast<const T*>(in.C) + batch * in.C_batch + group * in.C_group;
#pragma unroll
        for (int k = 0; k < kStage; ++k) {
            const int index = k * kBackwardThreads + tid;
            const int n = index % STATES;
            const bool second = index / STATES % 2 != 0;
            const int t = token_at(tile, index / kRow);
            next_bc[k] = from_float<T>(0.0f);
            if (index < kTile * kRow && t < seqlen && n < dstate)
                next_bc[k] = second ? C[static_cast<int64_t>(t) * static_cast<int>(in.C_token) + n]
                                    : B[static_cast<int64_t>(t) * static_cast<int>(in.B_token) + n];
        }
    };
    // The tile is whole when all threads have passed this point.
    auto arrive = [&](int buffer) {
#pragma unroll
        for (int k = 0; k < kStage; ++k) {
            const int index = k * kBackwardThreads + tid;
            if (index < kTile * kRow) shared.bc[buffer][index] = to_float(next_bc[k]);
        }
        wait_for_copies();
        __syncthreads();
    };

    copy_tile(walk.tile_at(0), 0);

    // `log2_decay` is A log2(e), as `advance` takes it.
    float log2_decay[kStatesPerThread], adjoint[kStatesPerThread], dA[kStatesPerThread];
#pragma unroll
    for (int n = 0; n < kStatesPerThread; ++n) {
        const int state = part * kStatesPerThread + n;
        const bool real = live && state < dstate;
        log2_decay[n] = real ? in.A[channel * dstate + state] * kLog2E : 0.0f;
        adjoint[n] = 0.0f;
        if (!ADJOINT_ONLY && chunks > 1)
            adjoint[n] = live ? workspace[plan.adjoints + (chunk_row + channel) * STATES + state] : 0.0f;
        else if (!ADJOINT_ONLY && real && direction.dlast_state != nullptr)
            adjoint[n] = direction.dlast_state[(batch * dim + channel) * dstate + state];
        dA[n] = 0.0f;
    }
    const float bias = in.delta_bias == nullptr ? 0.0f : in.delta_bias[channel];
    const float skip = in.D == nullptr ? 0.0f : in.D[channel];
    float dD = 0.0f, dbias = 0.0f, step_total = 0.0f;
    const float* boundary = in.boundaries + (batch * tiles * dim + channel) * STATES + part * kStatesPerThread;
    auto boundary_of = [&](int tile) {
        return *reinterpret_cast<const float4*>(boundary + static_cast<int64_t>(tile) * dim * STATES);
    };
    float4 next_boundary = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!ADJOINT_ONLY) next_boundary = boundary_of(walk.tile_at(0));

    arrive(0);
    float2* const steps = shared.steps[warp] + own;
    float* const gradients = shared.gradients[warp] + own;
    float* const slopes = shared.slopes[warp] + own;
    float* const sums = shared.sums[warp];

    for (int walked = 0; walked < walk.tiles(); ++walked) {
        const int tile = walk.tile_at(walked), buffer = walked & 1;
        const bool more = walked + 1 < walk.tiles();
        auto& inputs = shared.inputs[buffer];
        const float* bc = shared.bc[buffer] + part * kStatesPerThread;
        if (more) copy_tile(walk.tile_at(walked + 1), buffer ^ 1);

#pragma unroll
        for (int k = 0; k < Shape::kSteps; ++k) {
            const int i = k * kLanes + part;
            const int place = i * kPitch + column;
            const float raw = to_float(inputs.delta[place]) + bias;
            const float input = ADJOINT_ONLY ? 0.0f : to_float(inputs.u[place]);
            const float positive = softplus(raw), rising = sigmoid(raw);
            const float dout = to_float(inputs.dout[place]);
            float dt = args.softplus != 0 ? positive : raw, dy = dout * args.scale;
            if (gated) {
                const float gate = to_float(inputs.z[place]), s = sigmoid(gate);
                if (with_dz)  // `ungated` has the scale in it
                    inputs.z[place] = from_float<T>(dout * silu_slope(gate, s) * to_float(inputs.ungated[place]));
                dy *= gate * s;
            }
            if (token_at(tile, i) >= seqlen || !live) dt = 0.0f;
            steps[i * kWarpChannels] = {dt * input, dt};
            gradients[i * kWarpChannels] = dy;
            slopes[i * kWarpChannels] = args.softplus != 0 ? rising : 1.0f;
            step_total += dt;
        }
        __syncwarp();

        if (ADJOINT_ONLY) {
#pragma unroll
            for (int i = kTile - 1; i >= 0; --i) {
                const float dy = gradients[i * kWarpChannels], dt = steps[i * kWarpChannels].y;
                const float4 c4 = *reinterpret_cast<const float4*>(bc + i * kRow + STATES);
                const float c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                for (int n = 0; n < kStatesPerThread; ++n)
                    adjoint[n] = fmaf(c[n], dy, adjoint[n]) * exp2_fast(dt * log2_decay[n]);
            }
        } else {
            const float entering[kStatesPerThread] = {next_boundary.x, next_boundary.y, next_boundary.z,
                                                      next_boundary.w};
            if (more) next_boundary = boundary_of(walk.tile_at(walked + 1));
            // One operation for all states, then the next: neighbouring instructions are independent.
            auto each = [](auto operation) {
#pragma unroll
                for (int n = 0; n < kStatesPerThread; ++n) operation(n);
            };
            float state[kTile][kStatesPerThread];
#pragma unroll
            for (int i = 0; i < kTile; ++i) {
                const float2 step = steps[i * kWarpChannels];  // times u, and alone
                const float4 b4 = *reinterpret_cast<const float4*>(bc + i * kRow);
                const float b[4] = {b4.x, b4.y, b4.z, b4.w};
                const float* before = i == 0 ? entering : state[i > 0 ? i - 1 : 0];
                float decay[kStatesPerThread], input[kStatesPerThread];
                each([&](int n) { decay[n] = exp2_fast(step.y * log2_decay[n]); });
                each([&](int n) { input[n] = step.x * b[n]; });
                each([&](int n) { state[i][n] = fmaf(decay[n], before[n], input[n]); });
            }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
            // For these GPUs nvcc would keep the 64 decays of the loop above, for which two blocks a multiprocessor leave no
            // registers: they went through local memory. Steps that are read anew make it recompute them.
            if (STATES == 16) asm volatile("" ::: "memory");
#endif
            float input_sums[kLanes], step_sums[kLanes];
#pragma unroll
            for (int i = kTile - 1; i >= 0; --i) {
                const float2 step = steps[i * kWarpChannels];
                const float dy = gradients[i * kWarpChannels];
                const float4 b4 = *reinterpret_cast<const float4*>(bc + i * kRow);
                const float4 c4 = *reinterpret_cast<const float4*>(bc + i * kRow + STATES);
                const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
                const float* before = i == 0 ? entering : state[i > 0 ? i - 1 : 0];
                float gradient[kStatesPerThread];  // of the state after token i
                float decay[kStatesPerThread], through[kStatesPerThread];
                each([&](int n) { decay[n] = exp2_fast(step.y * log2_decay[n]); });
                each([&](int n) { gradient[n] = fmaf(c[n], dy, adjoint[n]); });
                each([&](int n) { adjoint[n] = gradient[n] * decay[n]; });
                each([&](int n) { through[n] = adjoint[n] * before[n]; });
                each([&](int n) { dA[n] = fmaf(through[n], step.y, dA[n]); });
                input_sums[i % kLanes] =
                    fmaf(gradient[0], b[0], gradient[1] * b[1]) + fmaf(gradient[2], b[2], gradient[3] * b[3]);
                step_sums[i % kLanes] = fmaf(through[0], log2_decay[0], through[1] * log2_decay[1]) +
                                        fmaf(through[2], log2_decay[2], through[3] * log2_decay[3]);
                float over_channels[2 * kStatesPerThread];
                each([&](int n) { over_channels[n] = gradient[n] * step.x; });
                each([&](int n) { over_channels[kStatesPerThread + n] = dy * state[i][n]; });
                constexpr int kKept = kLanes == 4 ? 1 : kLanes == 8 ? 2 : 4;  // 8 / kWarpChannels
                const int first = reduce_scatter<16, kLanes>(over_channels, lane);
#pragma unroll
                for (int k = 0; k < kKept; ++k) {
                    const int index = first + k;  // 0-3: dB of the lane's states; 4-7: dC
                    sums[i * kRow + index / 4 * STATES + part * kStatesPerThread + index % 4] = over_channels[k];
                }
                if (i % kLanes != 0) continue;
                // Lane `part` finishes token i + part.
                reduce_scatter<kLanes / 2, 1>(input_sums, part);
                reduce_scatter<kLanes / 2, 1>(step_sums, part);
                const float over_inputs = input_sums[0], over_steps = step_sums[0];
                const int mine = i + part, place = mine * kPitch + column;
                const float input = to_float(inputs.u[place]), own_dy = gradients[mine * kWarpChannels];
                // The derivative of exp(dt A) by dt needs A, and `log2_decay` is A log2(e).
                const float ddt = fmaf(over_steps, 1.0f / kLog2E, input * over_inputs) * slopes[mine * kWarpChannels];
                inputs.u[place] = from_float<T>(fmaf(steps[mine * kWarpChannels].y, over_inputs, skip * own_dy));
                inputs.delta[place] = from_float<T>(ddt);
                if (token_at(tile, mine) < seqlen) {
                    dD = fmaf(own_dy, input, dD);
                    dbias += ddt;
                }
            }
        }
        __syncthreads();

        if (!ADJOINT_ONLY) {
            auto send = [&](const T* source, void* data, int64_t batch_stride, int64_t token_stride) {
                if constexpr (ALIGNED) {
                    const int t = token_at(tile, piece_row);
                    if (tid < kTile * kPieces && t < seqlen && piece < live_channels)
                        *reinterpret_cast<float4*>(const_cast<T*>(row_of(data, batch_stride, token_stride, t)) +
                                                   piece) =
                            *reinterpret_cast<const float4*>(source + piece_row * kPitch + piece);
                } else {
#pragma unroll 1
                    for (int index = tid; index < kTile * kChannels; index += kBackwardThreads) {
                        const int i = index / kChannels, c = index % kChannels;
                        const int t = token_at(tile, i);
                        if (t < seqlen && c < live_channels)
                            const_cast<T*>(row_of(data, batch_stride, token_stride, t))[c] = source[i * kPitch + c];
                    }
                }
            };
            send(inputs.u, direction.du, args.seqlen * args.dim, args.dim);
            send(inputs.delta, direction.ddelta, args.seqlen * args.dim, args.dim);
            if (with_dz) send(inputs.z, args.dz, args.dz_batch, args.dz_token);
#pragma unroll 1
            for (int index = 4 * tid; index < kTile * kRow; index += 4 * kBackwardThreads) {
                const int t = token_at(tile, index / kRow);
                if (t >= seqlen) continue;
                float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int w = 0; w < kBackwardWarps; ++w) {
                    const float4 of_warp = *reinterpret_cast<const float4*>(shared.sums[w] + index);
                    sum = {sum.x + of_warp.x, sum.y + of_warp.y, sum.z + of_warp.z, sum.w + of_warp.w};
                }
                *reinterpret_cast<float4*>(
                    workspace + plan.bc + ((blockIdx.x * args.batch + batch) * seqlen + t) * kRow + index % kRow) = sum;
            }
        }
        if (more) arrive(buffer ^ 1);
    }

    auto over_lanes = [](float value) {
#pragma unroll
        for (int mask = 1; mask < kLanes; mask *= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
        return value;
    };
    if (ADJOINT_ONLY) {
        step_total = over_lanes(step_total);
        if (!live) return;
#pragma unroll
        for (int n = 0; n < kStatesPerThread; ++n)
            workspace[plan.adjoints + (chunk_row + channel) * STATES + part * kStatesPerThread + n] = adjoint[n];
        if (part == 0) workspace[plan.steps + chunk_row + channel] = step_total;
        return;
    }
    dD = over_lanes(dD);
    dbias = over_lanes(dbias);
    if (!live) return;
    const bool first_of_scan = chunk == (reverse ? chunks - 1 : 0);
#pragma unroll
    for (int n = 0; n < kStatesPerThread; ++n) {
        const int state = part * kStatesPerThread + n;
        if (state >= dstate) continue;
        workspace[plan.dA + (chunk_row + channel) * dstate + state] = dA[n];
        if (direction.dinitial_state != nullptr && first_of_scan)
            direction.dinitial_state[(batch * dim + channel) * dstate + state] = adjoint[n];
    }
    if (part == 0) {
        workspace[plan.channel + 2 * chunk_row + channel] = dD;
        workspace[plan.channel + 2 * chunk_row + dim + channel] = dbias;
    }
}

// Whether tiles can be copied 16 bytes at a time.
template <typename T, int STATES>
bool copies_fit(const ScanBackwardArgs& args) {
    constexpr int64_t size = sizeof(T);
    static_assert(BackwardShape<T, STATES>::kChannels * size % 16 == 0);
    bool fit = args.dim / args.groups * size % 16 == 0;
    auto check = [&](const void* data, int64_t batch_stride, int64_t token_stride) {
        fit = fit && rows_aligned(data, batch_stride, token_stride, size, 16);
    };
    check(args.z, args.z_batch, args.z_token);
    check(args.dout, args.dout_batch, args.dout_token);
    check(args.dz, args.dz_batch, args.dz_token);
    check(args.ungated, 0, 0);
    for (int i = 0; i < args.directions; ++i) {
        const ScanBackwardDirection& direction = args.direction[i];
        check(direction.in.u, direction.in.u_batch, direction.in.u_token);
        check(direction.in.delta, direction.in.delta_batch, direction.in.delta_token);
        check(direction.du, 0, 0);
        check(direction.ddelta, 0, 0);
    }
    return fit;
}

template <typename T, int STATES, bool ALIGNED>
int launch_backward(const ScanBackwardArgs& args, void* stream) {
    const BackwardPlan plan = plan_of(args);
    const unsigned directions = static_cast<unsigned>(args.directions);
    const dim3 grid(static_cast<unsigned>(plan.blocks * args.groups), static_cast<unsigned>(args.batch),
                    static_cast<unsigned>(plan.chunks) * directions);
    const size_t shared = sizeof(BackwardTiles<T, STATES>);
    auto scan = [&](void (*kernel)(ScanBackwardArgs)) {
        return launch(kernel, grid, kBackwardThreads, shared, stream, args);
    };
    if (plan.chunks > 1) {
        int status = scan(scan_backward_kernel<T, STATES, ALIGNED, true>);
        if (status != kOk) return status;
        status = join_adjoints(args, stream);
        if (status != kOk) return status;
    }
    int status = scan(scan_backward_kernel<T, STATES, ALIGNED, false>);
    if (status != kOk) return status;
    return finish_gradients(args, stream);
}

template <typename T>
int dispatch(const ScanBackwardArgs& args, void* stream) {
    switch (padded_states(args.dstate)) {
    case 16:
        return copies_fit<T, 16>(args) ? launch_backward<T, 16, true>(args, stream)
                                       : launch_backward<T, 16, false>(args, stream);
    case 32:
        return launch_backward<T, 32, false>(args, stream);
    default:
        return launch_backward<T, 64, false>(args, stream);
    }
}

}  // namespace
}  // namespace vim

extern "C" int vim_scan_backward(const vim::ScanBackwardArgs* args, void* stream) {
    using namespace vim;
    if (args->dstate < 1 || args->dstate > 64 || args->groups < 1 || args->dim % args->groups != 0) return kUnsupported;
    if (args->directions < 1 || args->directions > 2) return kUnsupported;
    const int64_t chunks = plan_of(*args).chunks;
    if (args->seqlen >= (int64_t{1} << 31) || args->dim * 64 >= (int64_t{1} << 31) || args->batch >= 65536 ||
        chunks * args->directions >= 65536)
        return kUnsupported;
    if (args->batch == 0 || args->seqlen == 0 || args->dim == 0) return kOk;
    return with_element_type(args->type, [&](auto element) { return dispatch<decltype(element)>(*args, stream); });
}

// Floats of scratch memory that vim_scan_backward needs.
extern "C" int64_t vim_scan_backward_workspace(int64_t batch, int64_t seqlen, int64_t dim, int32_t dstate,
                                               int32_t groups, int32_t directions, int32_t chunk_tiles) {
    return directions * vim::backward_plan(batch, seqlen, dim, dstate, groups, chunk_tiles).floats;
}

// Blocks of channels, for the caller's choice of chunks.
extern "C" int64_t vim_scan_backward_blocks(int64_t dim, int32_t dstate, int32_t groups) {
    return groups * vim::ceil_div(dim / groups, vim::backward_channels(vim::padded_states(dstate)));
}

template <typename T>
int64_t shared_bytes(int32_t dstate) {
    const int states = vim::padded_states(dstate);
    return states == 16   ? sizeof(vim::BackwardTiles<T, 16>)
           : states == 32 ? sizeof(vim::BackwardTiles<T, 32>)
                          : sizeof(vim::BackwardTiles<T, 64>);
}

extern "C" int64_t vim_scan_backward_shared_bytes(int32_t dstate) {
    return shared_bytes<float>(dstate);  // the largest of the types
}
