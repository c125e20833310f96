// Selective scan, forward (Mamba eq. 2-4): a thread owns CPT neighbouring channels with all their states in registers and
// walks over time; a block owns the channels of one batch row, and with two sides half of its threads run each direction.
//
// Both directions of a mixer meet in the middle: in the first half of its walk a side stores its plain y, in the second it
// reads what the other side left, adds its own, gates and stores the result. Nothing is added atomically, z is read once,
// and the barrier at each tile orders the two. With an odd number of tiles side 1 starts one step late, so that the two
// never work on the same tile.
#include <initializer_list>

#include "scan.h"

namespace vim {
namespace {

template <typename T, int CPT, int SIDES, bool STATES_ONLY>
__global__ void __launch_bounds__(kSideThreads* SIDES) scan_forward_kernel(const ScanForwardArgs args) {
    using Vector = Pack<T, CPT>;
    const int side_index = SIDES == 1 ? 0 : static_cast<int>(threadIdx.x) / kSideThreads;
    const int lane = static_cast<int>(threadIdx.x) - side_index * kSideThreads;
    const ScanSide& side = args.side[SIDES == 1 ? 0 : side_index];
    const bool reverse = side.reverse != 0;
    const int dstate = args.dstate;
    const int states = padded_states(dstate);
    const int split = CPT == 1 ? states / kThreadStates : 1;  // lanes that share a channel

    const int dim = static_cast<int>(args.dim);
    const int group_dim = dim / args.groups;
    const int block_channels = kSideThreads * CPT / split;
    const int channel_tiles = static_cast<int>(ceil_div(group_dim, block_channels));
    const int group = static_cast<int>(blockIdx.x) / channel_tiles;
    const int in_group = (static_cast<int>(blockIdx.x) % channel_tiles) * block_channels + lane / split * CPT;
    const bool live = in_group < group_dim;  // CPT divides group_dim: a thread's channels are all live or all dead
    const int channel = group * group_dim + (live ? in_group : 0);
    const int part = lane % split * kThreadStates;  // first of this thread's states
    const int64_t batch = blockIdx.y;

    const int seqlen = static_cast<int>(args.seqlen);
    const int total_tiles = static_cast<int>(ceil_div(seqlen, kTile));
    const int chunk_tiles = args.chunk_tiles > 0 ? args.chunk_tiles : total_tiles;
    const int chunk = blockIdx.z;
    const int chunks = (total_tiles + chunk_tiles - 1) / chunk_tiles;
    const int tile_begin = chunk * chunk_tiles;
    const int tile_end = tile_begin + chunk_tiles < total_tiles ? tile_begin + chunk_tiles : total_tiles;
    const int tiles = tile_end - tile_begin;

    // Two buffers of (token, B | C) rows for each side, in float.
    const int row_floats = 2 * states;
    const int buffer_floats = kTile * row_floats;
    float* bc_tiles = reinterpret_cast<float*>(vim_shared_memory) + side_index * 2 * buffer_floats;

    const T* u = static_cast<const T*>(side.u) + batch * side.u_batch + channel;
    const T* delta = static_cast<const T*>(side.delta) + batch * side.delta_batch + channel;
    const T* z = args.z == nullptr ? nullptr : static_cast<const T*>(args.z) + batch * args.z_batch + channel;
    const T* B = static_cast<const T*>(side.B) + batch * side.B_batch + group * side.B_group;
    const T* C = static_cast<const T*>(side.C) + batch * side.C_batch + group * side.C_group;
    const T* addend =
        args.addend == nullptr ? nullptr : static_cast<const T*>(args.addend) + batch * args.addend_batch + channel;
    T* out = STATES_ONLY ? nullptr : static_cast<T*>(args.out) + batch * args.out_batch + channel;
    // Token strides are below 2^31 (checked on the host), so that an offset is one 32 x 32 -> 64 bit product.
    const int u_token = static_cast<int>(side.u_token), delta_token = static_cast<int>(side.delta_token);
    const int z_token = static_cast<int>(args.z_token), out_token = static_cast<int>(args.out_token);
    const int addend_token = static_cast<int>(args.addend_token);
    auto at = [](int t, int stride) { return static_cast<int64_t>(t) * stride; };
    auto boundary_row = [&](int tile, int c) {
        return side.boundaries + ((batch * total_tiles + tile) * dim + channel + c) * states + part;
    };
    auto tile_at = [&](int walked) { return reverse ? tile_end - 1 - walked : tile_begin + walked; };

    float rate[CPT][kThreadStates], state[CPT][kThreadStates], skip[CPT], bias[CPT], step_sum[CPT];
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        skip[c] = side.D == nullptr || part != 0 ? 0.0f : side.D[channel + c];
        bias[c] = side.delta_bias == nullptr ? 0.0f : side.delta_bias[channel + c];
        step_sum[c] = 0.0f;
#pragma unroll
        for (int n = 0; n < kThreadStates; ++n) {
            const bool real = part + n < dstate;
            rate[c][n] = real ? side.A[(channel + c) * dstate + part + n] * kLog2E : 0.0f;
            state[c][n] = 0.0f;
            if (chunks > 1) {
                if (!STATES_ONLY) state[c][n] = boundary_row(tile_at(0), c)[n];
            } else if (side.initial_state != nullptr && real) {
                state[c][n] = side.initial_state[(batch * dim + channel + c) * dstate + part + n];
            }
        }
    }

    // A (token, B | C) tile goes through registers on its way to shared memory, so that its latency hides behind a whole
    // tile of work. Element k * kSideThreads + lane of the tile is this thread's.
    auto bc_element = [&](int tile, int index) {
        const int column = index % row_floats;
        const bool second = column >= states;
        const int n = second ? column - states : column;
        const int t = tile * kTile + index / row_floats;
        if (t >= seqlen || n >= dstate || (STATES_ONLY && second)) return from_float<T>(0.0f);
        return second ? C[at(t, static_cast<int>(side.C_token)) + n] : B[at(t, static_cast<int>(side.B_token)) + n];
    };
    constexpr int kStage = kTile * 2 * kThreadStates / kSideThreads;
    T stage[kStage];
    const int stage_token = lane / (2 * kThreadStates), stage_n = lane % kThreadStates;
    const bool stage_second = lane / kThreadStates % 2 != 0;
    const T* stage_source = (stage_second ? C : B) + stage_n;
    const int stage_stride = static_cast<int>(stage_second ? side.C_token : side.B_token);
    const bool stage_live = stage_n < dstate && !(STATES_ONLY && stage_second);
    auto fetch_bc = [&](int tile) {
        if (split > 1) return;
#pragma unroll
        for (int k = 0; k < kStage; ++k) {
            const int t = tile * kTile + 2 * k + stage_token;
            stage[k] = from_float<T>(0.0f);
            if (stage_live && t < seqlen) stage[k] = stage_source[at(t, stage_stride)];
        }
    };
    auto put_bc = [&](int tile, int buffer) {
        float* target = bc_tiles + buffer * buffer_floats;
        if (split > 1) {
            for (int index = lane; index < buffer_floats; index += kSideThreads)
                target[index] = to_float(bc_element(tile, index));
            return;
        }
#pragma unroll
        for (int k = 0; k < kStage; ++k) target[k * kSideThreads + lane] = to_float(stage[k]);
    };

    // u, delta and z are loaded kPrefetch tokens ahead into a ring, across tiles.
    Vector ring_u[kPrefetch], ring_delta[kPrefetch], ring_z[kPrefetch];
    auto fetch = [&](int slot, int walked, int i) {
        const int t = tile_at(walked) * kTile + (reverse ? kTile - 1 - i : i);
        if (walked >= tiles || t >= seqlen) return;
        ring_u[slot] = *reinterpret_cast<const Vector*>(u + at(t, u_token));
        ring_delta[slot] = *reinterpret_cast<const Vector*>(delta + at(t, delta_token));
        if (!STATES_ONLY && z != nullptr) ring_z[slot] = *reinterpret_cast<const Vector*>(z + at(t, z_token));
    };

    // Steps of the walk over tiles; with two sides and an odd number of tiles, side 1 is idle at step 0.
    const int odd = SIDES == 2 ? tiles % 2 : 0;
    const int late = side_index == 1 ? odd : 0;
    const int steps = tiles + odd;

    fetch_bc(tile_at(0));
    put_bc(tile_at(0), 0);
#pragma unroll
    for (int k = 0; k < kPrefetch; ++k) fetch(k, 0, k);
    __syncthreads();

    for (int step = 0; step < steps; ++step) {
        const int walked = step - late;
        if (walked >= 0 && walked < tiles) {
            const int tile = tile_at(walked);
            const int buffer = walked & 1;
            if (walked + 1 < tiles) fetch_bc(tile_at(walked + 1));
            // The side that comes to a tile second completes it; the other one is there at step `meets`.
            const int meets = tiles - 1 - walked + (side_index == 0 ? odd : 0);
            const bool second = SIDES == 2 && step > meets;
            const bool complete = SIDES == 1 || second;
            const T* onto = SIDES == 2 ? (second ? out : nullptr) : addend;
            const int onto_token = SIDES == 2 ? out_token : addend_token;

            if (args.save != 0 && live) {
#pragma unroll
                for (int c = 0; c < CPT; ++c)
#pragma unroll
                    for (int n = 0; n < kThreadStates; n += 4)
                        *reinterpret_cast<float4*>(boundary_row(tile, c) + n) =
                            float4{state[c][n], state[c][n + 1], state[c][n + 2], state[c][n + 3]};
            }

            const float* rows = bc_tiles + buffer * buffer_floats + part;
#pragma unroll 1
            for (int i0 = 0; i0 < kTile; i0 += kPrefetch) {
#pragma unroll
                for (int k = 0; k < kPrefetch; ++k) {
                    const int token = reverse ? kTile - 1 - (i0 + k) : i0 + k;
                    const int t = tile * kTile + token;
                    const Vector now_u = ring_u[k], now_delta = ring_delta[k], now_z = ring_z[k];
                    fetch(k, i0 + kPrefetch < kTile ? walked : walked + 1, (i0 + kPrefetch) % kTile + k);
                    if (t >= seqlen) continue;  // the same for the whole block
                    Vector other = {};
                    if (!STATES_ONLY && onto != nullptr) other = *reinterpret_cast<const Vector*>(onto + at(t, onto_token));
                    const float* row = rows + token * row_floats;
                    float dt[CPT], dtu[CPT], y[CPT];
#pragma unroll
                    for (int c = 0; c < CPT; ++c) {
                        const float input = to_float(now_u.values[c]);
                        dt[c] = to_float(now_delta.values[c]) + bias[c];
                        if (args.softplus != 0) dt[c] = softplus(dt[c]);
                        dtu[c] = dt[c] * input;
                        y[c] = skip[c] * input;
                        if (STATES_ONLY) step_sum[c] += dt[c];
                    }
#pragma unroll
                    for (int n = 0; n < kThreadStates; n += 4) {
                        const float4 b = *reinterpret_cast<const float4*>(row + n);
                        float4 weight = {0.0f, 0.0f, 0.0f, 0.0f};
                        if (!STATES_ONLY) weight = *reinterpret_cast<const float4*>(row + states + n);
#pragma unroll
                        for (int c = 0; c < CPT; ++c) {
                            float* h = state[c] + n;
                            const float* a = rate[c] + n;
                            h[0] = advance(h[0], dt[c], a[0], dtu[c], b.x);
                            h[1] = advance(h[1], dt[c], a[1], dtu[c], b.y);
                            h[2] = advance(h[2], dt[c], a[2], dtu[c], b.z);
                            h[3] = advance(h[3], dt[c], a[3], dtu[c], b.w);
                            if (STATES_ONLY) continue;
                            y[c] = fmaf(weight.x, h[0], y[c]);
                            y[c] = fmaf(weight.y, h[1], y[c]);
                            y[c] = fmaf(weight.z, h[2], y[c]);
                            y[c] = fmaf(weight.w, h[3], y[c]);
                        }
                    }
                    if (STATES_ONLY) continue;
                    for (int mask = 1; mask < split; mask *= 2)
#pragma unroll
                        for (int c = 0; c < CPT; ++c) y[c] += __shfl_xor_sync(0xffffffffu, y[c], mask);
                    Vector result;
#pragma unroll
                    for (int c = 0; c < CPT; ++c) {
                        float value = y[c];
                        if (SIDES == 2 && second) value += to_float(other.values[c]);
                        if (complete) value *= args.scale;
                        if (complete && z != nullptr) value *= silu(to_float(now_z.values[c]));
                        if (SIDES == 1 && onto != nullptr) value += to_float(other.values[c]);
                        result.values[c] = from_float<T>(value);
                    }
                    if (live && part == 0) *reinterpret_cast<Vector*>(out + at(t, out_token)) = result;
                }
            }
            if (walked + 1 < tiles) put_bc(tile_at(walked + 1), buffer ^ 1);
        }
        __syncthreads();
    }

    if (!live) return;
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        if (STATES_ONLY) {
            // What the chunk reaches from zero goes where the next chunk of the walk looks for the state it enters with.
            if (part == 0)
                args.chunk_steps[((side_index * args.batch + batch) * chunks + chunk) * dim + channel + c] = step_sum[c];
            const int next = reverse ? tile_begin - 1 : tile_end;
            if (next < 0 || next >= total_tiles) continue;
#pragma unroll
            for (int n = 0; n < kThreadStates; ++n) boundary_row(next, c)[n] = state[c][n];
        } else if (side.last_state != nullptr && (reverse ? tile_begin == 0 : tile_end == total_tiles)) {
#pragma unroll
            for (int n = 0; n < kThreadStates; ++n)
                if (part + n < dstate)
                    side.last_state[(batch * dim + channel + c) * dstate + part + n] = state[c][n];
        }
    }
}

// Between the two passes over a long sequence: turns the state that each chunk reaches from zero into the state that the
// next chunk really enters with, h <- 2^(rate * sum dt) h + local, one thread per (batch, channel, state).
__global__ void __launch_bounds__(256) join_chunks_kernel(const ScanForwardArgs args) {
    const int states = padded_states(args.dstate);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int side_index = blockIdx.z;
    const ScanSide& side = args.side[side_index];
    const int64_t batch = blockIdx.y;
    if (index >= args.dim * states) return;
    const int64_t channel = index / states;
    const int n = static_cast<int>(index % states);
    const int total_tiles = static_cast<int>(ceil_div(args.seqlen, kTile));
    const int chunks = (total_tiles + args.chunk_tiles - 1) / args.chunk_tiles;
    const bool real = n < args.dstate;
    const float rate = real ? side.A[channel * args.dstate + n] * kLog2E : 0.0f;
    float state = side.initial_state != nullptr && real ? side.initial_state[(batch * args.dim + channel) * args.dstate + n] : 0.0f;
    for (int walked = 0; walked < chunks; ++walked) {
        const int chunk = side.reverse ? chunks - 1 - walked : walked;
        const int begin = chunk * args.chunk_tiles;
        const int end = begin + args.chunk_tiles < total_tiles ? begin + args.chunk_tiles : total_tiles;
        const int entering = side.reverse ? end - 1 : begin;
        float* boundary = side.boundaries + ((batch * total_tiles + entering) * args.dim + channel) * states + n;
        const float local = walked == 0 ? 0.0f : *boundary;
        if (walked > 0) {
            const int before = side.reverse ? chunk + 1 : chunk - 1;
            const float steps = args.chunk_steps[((side_index * args.batch + batch) * chunks + before) * args.dim + channel];
            state = fmaf(exp2_fast(rate * steps), state, local);
        }
        *boundary = state;
    }
}

template <typename T, int CPT, int SIDES>
int launch_forward(const ScanForwardArgs& args, void* stream) {
    const int states = padded_states(args.dstate);
    const int64_t blocks = forward_blocks(args.dim, args.dstate, args.groups, CPT);
    const int64_t tiles = ceil_div(args.seqlen, kTile);
    const int64_t chunks = args.chunk_tiles > 0 ? ceil_div(tiles, args.chunk_tiles) : 1;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.batch), static_cast<unsigned>(chunks));
    const size_t shared = sizeof(float) * SIDES * 2 * kTile * 2 * states;
    if (chunks > 1) {
        ScanForwardArgs first = args;
        first.save = 0;
        int status =
            launch(scan_forward_kernel<T, CPT, SIDES, true>, grid, kSideThreads * SIDES, shared, stream, first);
        if (status != kOk) return status;
        const dim3 join_grid(static_cast<unsigned>(ceil_div(args.dim * states, 256)), static_cast<unsigned>(args.batch),
                             SIDES);
        status = launch(join_chunks_kernel, join_grid, 256, 0, stream, args);
        if (status != kOk) return status;
    }
    return launch(scan_forward_kernel<T, CPT, SIDES, false>, grid, kSideThreads * SIDES, shared, stream, args);
}

// Whether every row of a tensor starts on a multiple of two elements, so that pairs of channels load as one word.
bool even_rows(const void* data, int64_t batch_stride, int64_t token_stride, int64_t element_size) {
    return data == nullptr || (reinterpret_cast<uintptr_t>(data) % (2 * element_size) == 0 && batch_stride % 2 == 0 &&
                               token_stride % 2 == 0);
}

bool pairs_fit(const ScanForwardArgs& args) {
    const int64_t size = args.type == kFloat32 ? 4 : 2;
    bool fit = args.dim / args.groups % 2 == 0 && padded_states(args.dstate) == kThreadStates &&
               even_rows(args.z, args.z_batch, args.z_token, size) &&
               even_rows(args.addend, args.addend_batch, args.addend_token, size) &&
               even_rows(args.out, args.out_batch, args.out_token, size);
    for (int i = 0; i < args.sides; ++i) {
        const ScanSide& side = args.side[i];
        fit = fit && even_rows(side.u, side.u_batch, side.u_token, size) &&
              even_rows(side.delta, side.delta_batch, side.delta_token, size);
    }
    return fit;
}

template <typename T>
int dispatch(const ScanForwardArgs& args, void* stream) {
    if (args.sides == 1) return launch_forward<T, 1, 1>(args, stream);
    return args.pairs != 0 && pairs_fit(args) ? launch_forward<T, 2, 2>(args, stream)
                                              : launch_forward<T, 1, 2>(args, stream);
}

bool strides_fit(const ScanForwardArgs& args) {
    int64_t limit = args.seqlen;
    for (int64_t stride : {args.z_token, args.addend_token, args.out_token, args.side[0].u_token,
                           args.side[0].delta_token, args.side[0].B_token, args.side[0].C_token, args.side[1].u_token,
                           args.side[1].delta_token, args.side[1].B_token, args.side[1].C_token, args.dim * 64})
        limit = limit > stride ? limit : stride;
    return limit < (int64_t{1} << 31) && args.batch < 65536;
}

}  // namespace
}  // namespace vim

extern "C" int vim_scan_forward(const vim::ScanForwardArgs* args, void* stream) {
    using namespace vim;
    if (args->dstate < 1 || args->dstate > 64 || args->groups < 1 || args->dim % args->groups != 0) return kUnsupported;
    if (args->sides == 2 && (args->side[0].reverse == args->side[1].reverse || args->addend != nullptr))
        return kUnsupported;
    if (!strides_fit(*args)) return kUnsupported;
    if (args->batch == 0 || args->seqlen == 0 || args->dim == 0) return kOk;
    if (args->type == kFloat32) return dispatch<float>(*args, stream);
    if (args->type == kBFloat16) return dispatch<BFloat16>(*args, stream);
    if (args->type == kFloat16) return dispatch<Float16>(*args, stream);
    return kUnsupported;
}

extern "C" int64_t vim_scan_forward_blocks(int64_t dim, int32_t dstate, int32_t groups, int32_t channels_per_thread) {
    return vim::forward_blocks(dim, dstate, groups, channels_per_thread);
}

extern "C" int64_t vim_scan_boundary_floats(int64_t batch, int64_t seqlen, int64_t dim, int32_t dstate) {
    return batch * vim::ceil_div(seqlen, vim::kTile) * dim * vim::padded_states(dstate);
}

// Architectures with machine code in this library, as "80;90;100"; the newest is there as PTX too.
#ifndef VIM_CUDA_ARCHITECTURES
#define VIM_CUDA_ARCHITECTURES ""
#endif
extern "C" const char* vim_cuda_architectures() { return VIM_CUDA_ARCHITECTURES; }
