// Selective scan, forward (Mamba eq. 2-4): four lanes share a channel (or a pair of them), each with a quarter of its states
// in registers, and walk over time four tokens at a time. What is per token and channel (loads, softplus, gate, store) a lane
// does for one token of the four; the others get its step through shared memory, and the four partial sums over states meet
// in a reduce-scatter. A block owns some channels of one batch row, and with two directions half of its threads run each direction.
//
// Both directions of a mixer meet in the middle: in the first half of its walk a direction stores its plain y, in the second it
// reads what the other direction left, adds its own, gates and stores the result. Nothing is added atomically, z is read once,
// and the barrier at each tile orders the two. With an odd number of tiles direction 1 starts one step late, so that the two
// never work on the same tile.
#include <initializer_list>
#include <type_traits>

#include "scan_lane.h"
#include "scan_stream.h"

namespace vim {
namespace {

template <typename T>
VIM_DEVICE const char* row_of(const void* data, int64_t offset) {
    return reinterpret_cast<const char*>(static_cast<const T*>(data) + offset);
}

// One element for each of a lane's channels, as one word: taken apart only where it is used.
template <typename T, int CPT>
struct Word {
    using Bits = std::conditional_t<sizeof(T) * CPT == 8, uint64_t,
                                    std::conditional_t<sizeof(T) * CPT == 4, uint32_t, uint16_t>>;
    Bits bits = 0;

    VIM_DEVICE void load(const char* place) { bits = *reinterpret_cast<const Bits*>(place); }

    VIM_DEVICE float operator[](int c) const {
        if constexpr (sizeof(T) == 4) {
            union {
                uint32_t half;
                float number;
            } cast;
            cast.half = static_cast<uint32_t>(CPT == 2 && c == 1 ? static_cast<uint64_t>(bits) >> 32 : bits);
            return cast.number;
        } else {
            return to_float(T{static_cast<uint16_t>(CPT == 2 && c == 1 ? static_cast<uint32_t>(bits) >> 16 : bits)});
        }
    }
};

// NPL: states per lane, CPT: channels per lane. The bound on registers is what lets Ti at batch 128 run in two full waves.
template <typename T, int NPL, int CPT, int DIRECTIONS, bool STATES_ONLY>
__global__ void __launch_bounds__(kDirectionThreads* DIRECTIONS, NPL == 4 ? kForwardWarps / DIRECTIONS / 2 : 1)
    scan_forward_kernel(const ScanForwardArgs args) {
    using Values = Word<T, CPT>;
    using Steps = Pack<float, 2 * CPT>;
    constexpr int kStates = NPL * kLanes;
    constexpr int kRow = 2 * kStates;  // B | C of a token
    constexpr int kStage = kTile * kRow / kDirectionThreads;  // elements of a tile of B and C that a thread brings in
    constexpr int kGroups = kTile / kLanes;
    const int direction_index = DIRECTIONS == 1 ? 0 : static_cast<int>(threadIdx.x) / kDirectionThreads;
    const int thread = static_cast<int>(threadIdx.x) - direction_index * kDirectionThreads;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int column = thread % kWarpColumns;  // which channels of the warp's
    const int part = thread % 32 / kWarpColumns;  // which states of theirs, and which token of each four
    const ScanDirection& direction = args.direction[DIRECTIONS == 1 ? 0 : direction_index];
    const bool reverse = direction.reverse != 0;
    const int dstate = args.dstate;

    const int dim = static_cast<int>(args.dim);
    const int group_dim = dim / args.groups;
    constexpr int kChannels = kDirectionThreads / kLanes * CPT;  // of the block
    const int channel_tiles = static_cast<int>(ceil_div(group_dim, kChannels));
    const int group = static_cast<int>(blockIdx.x) / channel_tiles;
    const int in_group =
        (static_cast<int>(blockIdx.x) % channel_tiles) * kChannels + (thread / 32 * kWarpColumns + column) * CPT;
    const bool live = in_group < group_dim;  // CPT divides group_dim: a lane's channels are all live or all dead
    const int channel = group * group_dim + (live ? in_group : 0);
    const int64_t batch = blockIdx.y;

    const Walk walk(args.seqlen, args.chunk_tiles, blockIdx.z, reverse);
    const int tiles = walk.tiles();

    // Two buffers of (token, B | C) rows for each direction, then two of (part, column) steps for each warp, in float.
    float* bc_tiles = reinterpret_cast<float*>(vim_shared_memory) + direction_index * 2 * kTile * kRow;
    Steps* steps_of_warp =
        reinterpret_cast<Steps*>(reinterpret_cast<float*>(vim_shared_memory) + DIRECTIONS * 2 * kTile * kRow) +
        warp * 64;

    // Places are counted from 0 along the walk. What a lane reads and writes is found by pointers that move on by four tokens
    // (the first to read u and delta are a group ahead, those to B and C a tile): few registers, and few instructions.
    const int first_token = walk.first_token(), onward = walk.onward();
    const int size = static_cast<int>(sizeof(T));
    auto start = [&](const void* data, int64_t batch_stride, int64_t token_stride, int64_t column_, int token) {
        return const_cast<char*>(row_of<T>(data, batch * batch_stride + token * token_stride + column_));
    };
    auto stride = [&](int64_t token_stride) { return static_cast<int>(token_stride) * onward * kLanes * size; };
    const int own_first = first_token + onward * part;
    const char* u = start(direction.u, direction.u_batch, direction.u_token, channel, own_first);
    const char* delta = start(direction.delta, direction.delta_batch, direction.delta_token, channel, own_first);
    const bool gated = args.z != nullptr;
    const char* z = gated ? start(args.z, args.z_batch, args.z_token, channel, own_first) : nullptr;
    const bool added = DIRECTIONS == 1 && args.addend != nullptr;
    const char* addend = added ? start(args.addend, args.addend_batch, args.addend_token, channel, own_first) : nullptr;
    char* out = STATES_ONLY ? nullptr : start(args.out, args.out_batch, args.out_token, channel, own_first);
    const bool keeps = !STATES_ONLY && args.ungated != nullptr;
    char* ungated = keeps ? start(args.ungated, args.seqlen * args.dim, args.dim, channel, own_first) : nullptr;
    const int ungated_step = stride(args.dim);
    const int u_step = stride(direction.u_token), delta_step = stride(direction.delta_token),
              out_step = stride(args.out_token);
    const int z_step = stride(args.z_token), addend_step = stride(args.addend_token);
    auto boundary_row = [&](int tile, int c) {
        return direction.boundaries + ((batch * walk.total_tiles + tile) * dim + channel + c) * kStates + part * NPL;
    };

    float log2_decay[CPT][NPL], state[CPT][NPL], skip[CPT], bias[CPT], step_sum[CPT];
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        skip[c] = direction.D == nullptr ? 0.0f : direction.D[channel + c];
        bias[c] = direction.delta_bias == nullptr ? 0.0f : direction.delta_bias[channel + c];
        step_sum[c] = 0.0f;
#pragma unroll
        for (int n = 0; n < NPL; ++n) {
            const int index = part * NPL + n;
            const bool real = index < dstate;
            log2_decay[c][n] = real ? direction.A[(channel + c) * dstate + index] * kLog2E : 0.0f;
            state[c][n] = 0.0f;
            if (walk.chunks > 1) {
                if (!STATES_ONLY) state[c][n] = boundary_row(walk.tile_at(0), c)[n];
            } else if (direction.initial_state != nullptr && real) {
                state[c][n] = direction.initial_state[(batch * dim + channel + c) * dstate + index];
            }
        }
    }

    // The next tile of (place, B | C) rows comes in piece by piece, one before each group of four tokens: element
    // k * kDirectionThreads + thread of the piece is this thread's. Up to 32 states a thread's column is the same for all k; with
    // 64, k alternates between B and C.
    constexpr int kPiece = kStage / kGroups;
    constexpr bool kAlternate = kRow > kDirectionThreads;
    constexpr int kApart =
        kAlternate ? 1 : kDirectionThreads / kRow;  // tokens between a thread's elements of one matrix
    const int bc_n = thread % kStates;
    const bool bc_second = !kAlternate && thread % kRow >= kStates;
    const int bc_first = first_token + onward * (kAlternate ? 0 : thread / kRow);
    const int64_t B_first = batch * direction.B_batch + group * direction.B_group + bc_first * direction.B_token + bc_n;
    const int64_t C_first = batch * direction.C_batch + group * direction.C_group + bc_first * direction.C_token + bc_n;
    const char* bc = bc_second ? row_of<T>(direction.C, C_first) : row_of<T>(direction.B, B_first);
    const char* other_bc = row_of<T>(direction.C, C_first);  // of the elements with odd k, if they alternate
    const int bc_step = stride(bc_second ? direction.C_token : direction.B_token),
              other_step = stride(direction.C_token);
    const bool bc_live = bc_n < dstate && !(STATES_ONLY && bc_second);
    int bc_token = bc_first;
    T piece[kPiece];
    auto fetch_bc = [&] {
#pragma unroll
        for (int k = 0; k < kPiece; ++k) {
            const int apart = kAlternate ? k / 2 : k * kApart;
            const bool odd_k = kAlternate && k % 2 != 0;
            piece[k] = from_float<T>(0.0f);
            if (!walk.in_sequence(bc_token + onward * apart) || !bc_live || (STATES_ONLY && odd_k)) continue;
            piece[k] =
                *reinterpret_cast<const T*>((odd_k ? other_bc : bc) + (odd_k ? other_step : bc_step) / kLanes * apart);
        }
        bc_token += onward * kLanes;
        bc += bc_step;
        if (kAlternate) other_bc += other_step;
    };
    auto put_bc = [&](float* target) {
#pragma unroll
        for (int k = 0; k < kPiece; ++k) target[k * kDirectionThreads + thread] = to_float(piece[k]);
    };

    Values next_u, next_delta;
    auto fetch = [&](int t) {
        next_u.bits = next_delta.bits = 0;
        if (walk.in_sequence(t)) {
            next_u.load(u);
            next_delta.load(delta);
        }
        u += u_step;
        delta += delta_step;
    };

    // Steps of the walk over tiles; with two directions and an odd number of tiles, direction 1 is idle at step 0.
    const int odd = DIRECTIONS == 2 ? tiles % 2 : 0;
    const int late = direction_index == 1 ? odd : 0;
    const int steps = tiles + odd;

    for (int g = 0; g < kGroups; ++g) {
        fetch_bc();
        put_bc(bc_tiles + g * kLanes * kRow);
    }
    fetch(own_first);
    int t = own_first;  // this lane's token
    int slot = 0;
    __syncthreads();

    for (int step = 0; step < steps; ++step) {
        const int walked = step - late;
        if (walked >= 0 && walked < tiles) {
            const int tile = walk.tile_at(walked);
            const float* row = bc_tiles + (walked & 1) * kTile * kRow + part * NPL;
            float* next_row = bc_tiles + (walked & 1 ^ 1) * kTile * kRow;
            // The direction that comes to a tile second completes it; the other one is there at step `meets`.
            const int meets = tiles - 1 - walked + (direction_index == 0 ? odd : 0);
            const bool second = DIRECTIONS == 2 && step > meets;
            const bool complete = DIRECTIONS == 1 || second;

            if (args.save != 0 && live) {
#pragma unroll
                for (int c = 0; c < CPT; ++c)
#pragma unroll
                    for (int n = 0; n < NPL; n += 4)
                        *reinterpret_cast<float4*>(boundary_row(tile, c) + n) =
                            float4{state[c][n], state[c][n + 1], state[c][n + 2], state[c][n + 3]};
            }

#pragma unroll 1
            for (int g = 0; g < kGroups; ++g) {
                const bool inside = walk.in_sequence(t);
                const Values now_u = next_u, now_delta = next_delta;
                fetch_bc();
                fetch(t + onward * kLanes);
                Values gate, other;
                if (!STATES_ONLY && inside && complete && gated) gate.load(z);
                if (!STATES_ONLY && inside && second) other.load(out);
                if (!STATES_ONLY && inside && added) other.load(addend);
                Steps own;
#pragma unroll
                for (int c = 0; c < CPT; ++c) {
                    const float dt = step_of(now_delta[c], bias[c], args.softplus, inside);
                    if (STATES_ONLY) step_sum[c] += dt;
                    own.values[2 * c] = dt;
                    own.values[2 * c + 1] = dt * now_u[c];
                }
                // Two sets of steps, in turn: a lane that is ahead by one group overwrites none that another still reads.
                Steps* const steps_of_group = steps_of_warp + slot + column;
                slot ^= 32;
                steps_of_group[part * kWarpColumns] = own;
                __syncwarp();

                float y[CPT][kLanes];
#pragma unroll
                for (int j = 0; j < kLanes; ++j) {
                    const Steps now = steps_of_group[j * kWarpColumns];
#pragma unroll
                    for (int c = 0; c < CPT; ++c) y[c][j] = 0.0f;
#pragma unroll
                    for (int n = 0; n < NPL; n += 4) {
                        const float4 b = *reinterpret_cast<const float4*>(row + j * kRow + n);
                        float4 weight = {0.0f, 0.0f, 0.0f, 0.0f};
                        if (!STATES_ONLY) weight = *reinterpret_cast<const float4*>(row + j * kRow + kStates + n);
#pragma unroll
                        for (int c = 0; c < CPT; ++c) {
                            const float dt = now.values[2 * c], dtu = now.values[2 * c + 1];
                            float* h = state[c] + n;
                            const float* a = log2_decay[c] + n;
                            float& sum = y[c][j];
                            h[0] = advance(h[0], dt, a[0], dtu, b.x);
                            h[1] = advance(h[1], dt, a[1], dtu, b.y);
                            h[2] = advance(h[2], dt, a[2], dtu, b.z);
                            h[3] = advance(h[3], dt, a[3], dtu, b.w);
                            sum = fmaf(weight.x, h[0], sum);
                            sum = fmaf(weight.y, h[1], sum);
                            sum = fmaf(weight.z, h[2], sum);
                            sum = fmaf(weight.w, h[3], sum);
                        }
                    }
                }
                put_bc(next_row);
                row += kLanes * kRow;
                next_row += kLanes * kRow;
                t += onward * kLanes;
                if (STATES_ONLY) continue;
                float value[CPT];
                sum_parts<DIRECTIONS>(value, y, part, skip, now_u, other);
                if (keeps) {
                    store_pack<T>(ungated, value, args.scale, complete && live && inside);
                    ungated += ungated_step;
                }
                if (complete && gated) {
#pragma unroll
                    for (int c = 0; c < CPT; ++c) value[c] *= silu(gate[c]);
                }
                store_output<T, DIRECTIONS>(out, value, args.scale, other, complete, live && inside);
                z += z_step;
                out += out_step;
                if (added) addend += addend_step;
            }
        }
        __syncthreads();
    }

    leave<STATES_ONLY>(args, direction, direction_index, walk, batch, dim, channel, part, dstate, live, state, step_sum,
                       boundary_row);
}

// Between the two passes over a long sequence: turns the state that each chunk reaches from zero into the state that the
// next chunk really enters with, h <- 2^(log2_decay * sum dt) h + local, one thread per (batch, channel, state).
__global__ void __launch_bounds__(256) join_states_kernel(const ScanForwardArgs args) {
    const int states = padded_states(args.dstate);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int direction_index = blockIdx.z;
    const ScanDirection& direction = args.direction[direction_index];
    const int64_t batch = blockIdx.y;
    if (index >= args.dim * states) return;
    const int64_t channel = index / states;
    const int n = static_cast<int>(index % states);
    const int total_tiles = static_cast<int>(ceil_div(args.seqlen, kTile));
    const int chunks = (total_tiles + args.chunk_tiles - 1) / args.chunk_tiles;
    const bool real = n < args.dstate;
    const float log2_decay = real ? direction.A[channel * args.dstate + n] * kLog2E : 0.0f;
    float state = direction.initial_state != nullptr && real
                      ? direction.initial_state[(batch * args.dim + channel) * args.dstate + n]
                      : 0.0f;
    for (int walked = 0; walked < chunks; ++walked) {
        const int chunk = direction.reverse ? chunks - 1 - walked : walked;
        const int begin = chunk * args.chunk_tiles;
        const int end = begin + args.chunk_tiles < total_tiles ? begin + args.chunk_tiles : total_tiles;
        const int entering = direction.reverse ? end - 1 : begin;
        float* boundary = direction.boundaries + ((batch * total_tiles + entering) * args.dim + channel) * states + n;
        const float local = walked == 0 ? 0.0f : *boundary;
        if (walked > 0) {
            const int before = direction.reverse ? chunk + 1 : chunk - 1;
            const float steps =
                args.chunk_steps[((direction_index * args.batch + batch) * chunks + before) * args.dim + channel];
            state = fmaf(exp2_fast(log2_decay * steps), state, local);
        }
        *boundary = state;
    }
}

template <typename T, int NPL, int CPT, int DIRECTIONS>
int launch_forward(const ScanForwardArgs& args, void* stream) {
    constexpr int kStates = NPL * kLanes;
    const bool streamed = NPL == 4 && CPT == 2 && stream_fits(args);
    auto scan = [&](bool states_only, dim3 grid, int threads, size_t shared, const ScanForwardArgs& given) {
        if (streamed) return launch_stream(given, states_only, grid, stream);
        return states_only
                   ? launch(scan_forward_kernel<T, NPL, CPT, DIRECTIONS, true>, grid, threads, shared, stream, given)
                   : launch(scan_forward_kernel<T, NPL, CPT, DIRECTIONS, false>, grid, threads, shared, stream, given);
    };
    const int64_t blocks = forward_blocks(args.dim, args.groups, CPT);
    const int64_t tiles = ceil_div(args.seqlen, kTile);
    const int64_t chunks = args.chunk_tiles > 0 ? ceil_div(tiles, args.chunk_tiles) : 1;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.batch), static_cast<unsigned>(chunks));
    const int threads = kDirectionThreads * DIRECTIONS;
    const size_t shared = sizeof(float) * (DIRECTIONS * 2 * kTile * 2 * kStates + threads * 2 * 2 * CPT);
    if (chunks > 1) {
        ScanForwardArgs first = args;
        first.save = 0;
        int status = scan(true, grid, threads, shared, first);
        if (status != kOk) return status;
        const dim3 join_grid(static_cast<unsigned>(ceil_div(args.dim * kStates, 256)),
                             static_cast<unsigned>(args.batch), DIRECTIONS);
        status = launch(join_states_kernel, join_grid, 256, 0, stream, args);
        if (status != kOk) return status;
    }
    return scan(false, grid, threads, shared, args);
}

// Whether pairs of channels load as one word.
bool pairs_fit(const ScanForwardArgs& args) {
    const int64_t size = args.type == kFloat32 ? 4 : 2;
    auto even = [&](const void* data, int64_t batch_stride, int64_t token_stride) {
        return rows_aligned(data, batch_stride, token_stride, size, 2 * size);
    };
    bool fit = args.dim / args.groups % 2 == 0 && padded_states(args.dstate) == 4 * kLanes &&
               even(args.z, args.z_batch, args.z_token) && even(args.addend, args.addend_batch, args.addend_token) &&
               even(args.out, args.out_batch, args.out_token);
    for (int i = 0; i < args.directions; ++i) {
        const ScanDirection& direction = args.direction[i];
        fit = fit && even(direction.u, direction.u_batch, direction.u_token) &&
              even(direction.delta, direction.delta_batch, direction.delta_token);
    }
    return fit;
}

template <typename T, int DIRECTIONS>
int dispatch_states(const ScanForwardArgs& args, void* stream) {
    switch (padded_states(args.dstate)) {
    case 16:
        return pairs_fit(args) ? launch_forward<T, 4, 2, DIRECTIONS>(args, stream)
                               : launch_forward<T, 4, 1, DIRECTIONS>(args, stream);
    case 32:
        return launch_forward<T, 8, 1, DIRECTIONS>(args, stream);
    default:
        return launch_forward<T, 16, 1, DIRECTIONS>(args, stream);
    }
}

template <typename T>
int dispatch(const ScanForwardArgs& args, void* stream) {
    return args.directions == 1 ? dispatch_states<T, 1>(args, stream) : dispatch_states<T, 2>(args, stream);
}

// Offsets within a row of tokens are products of a token and a stride in bytes, both in 32 bits.
bool strides_fit(const ScanForwardArgs& args) {
    int64_t limit = args.seqlen;
    for (int64_t stride :
         {args.z_token, args.addend_token, args.out_token, args.direction[0].u_token, args.direction[0].delta_token,
          args.direction[0].B_token, args.direction[0].C_token, args.direction[1].u_token,
          args.direction[1].delta_token, args.direction[1].B_token, args.direction[1].C_token, args.dim * 64})
        limit = limit > stride ? limit : stride;
    return limit < (int64_t{1} << 29) && args.batch < 65536;
}

}  // namespace
}  // namespace vim

extern "C" int vim_scan_forward(const vim::ScanForwardArgs* args, void* stream) {
    using namespace vim;
    if (args->dstate < 1 || args->dstate > 64 || args->groups < 1 || args->dim % args->groups != 0) return kUnsupported;
    if (args->directions == 2 && (args->direction[0].reverse == args->direction[1].reverse || args->addend != nullptr))
        return kUnsupported;
    if (!strides_fit(*args)) return kUnsupported;
    if (args->batch == 0 || args->seqlen == 0 || args->dim == 0) return kOk;
    return with_element_type(args->type, [&](auto element) { return dispatch<decltype(element)>(*args, stream); });
}

extern "C" int64_t vim_scan_forward_blocks(int64_t dim, int32_t groups, int32_t channels_per_lane) {
    return vim::forward_blocks(dim, groups, channels_per_lane);
}

extern "C" int64_t vim_scan_boundary_floats(int64_t batch, int64_t seqlen, int64_t dim, int32_t dstate) {
    return batch * vim::ceil_div(seqlen, vim::kTile) * dim * vim::padded_states(dstate);
}
