// Selective scan, forward, for 16 states and a multiple of 32 channels, as Vim has: the arithmetic of scan_forward.cu, fed by
// asynchronous copies of whole tiles into shared memory, so that no register waits for memory.
//
// Four lanes share a pair of channels, each with a quarter of its states, and take four tokens at a time. What is per token
// and channel (softplus, gate, store) a lane does for one token of the four; the others get its step through shared memory.
//
// Both directions of a mixer meet in the middle: each direction first walks its own half of the sequence and stores its plain y;
// then, past the one barrier that they share, it walks the other half, adds what it finds there, gates and stores the result.
#include <type_traits>

#include "async_copy.h"
#include "scan_lane.h"
#include "scan_stream.h"

namespace vim {
namespace {

constexpr int kQuarter = 4;  // states of a lane
constexpr int kChannels = kStreamChannels;  // of a block
constexpr int kStates = kQuarter * kLanes;
constexpr int kGroups = kTile / kLanes;
constexpr int kTileElements =
    kTile * kChannels;  // of a tile of u, delta or z, and of B | C: 2 * kStates is kChannels too
static_assert(2 * kStates == kChannels);

// A tile's rows lie in the order of the walk. Pieces of 16 bytes change places within some rows, so that the lanes of a warp,
// which read four rows at once, meet no bank twice.
template <typename T>
VIM_HD constexpr int swap_pieces(int row) {
    return sizeof(T) == 2 ? (row >> 1 & 1) * 2 : (row & 1) * 4;
}

// Neighbouring elements, taken apart only where they are used: half a word of bfloat16 is one instruction from a float.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Bundle {
    uint32_t words[sizeof(T) * COUNT / 4] = {};

    VIM_DEVICE float operator[](int i) const {
        union {
            uint32_t bits;
            float number;
        } cast;
        if constexpr (sizeof(T) == 4)
            cast.bits = words[i];
        else if constexpr (std::is_same_v<T, BFloat16>)
            cast.bits = i % 2 != 0 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16;
        else
            return to_float(T{static_cast<uint16_t>(i % 2 != 0 ? words[i / 2] >> 16 : words[i / 2])});
        return cast.number;
    }
};

template <typename T>
struct Tiles {
    T u[2][kTileElements], delta[2][kTileElements], z[2][kTileElements];
    float bc[2][kTileElements];  // rows of B | C
    float4 steps[2][2][32];  // [warp][set][token of four, pair]: step and step * u of both channels
};

template <typename T, int DIRECTIONS, bool STATES_ONLY>
__global__ void __launch_bounds__(kDirectionThreads* DIRECTIONS, kForwardWarps / DIRECTIONS / 2)
    scan_stream_kernel(const ScanForwardArgs args) {
    using Pair = Bundle<T, 2>;
    using Quad = Bundle<T, 4>;
    constexpr int size = sizeof(T);
    const int direction_index = DIRECTIONS == 1 ? 0 : static_cast<int>(threadIdx.x) / kDirectionThreads;
    const int thread = static_cast<int>(threadIdx.x) - direction_index * kDirectionThreads;
    const int warp = thread / 32;
    const int column = thread % kWarpColumns;  // which pair of the warp's
    const int part = thread % 32 / kWarpColumns;  // which states of theirs, and which token of each four
    const ScanDirection& direction = args.direction[DIRECTIONS == 1 ? 0 : direction_index];
    const bool reverse = direction.reverse != 0;
    const int dim = static_cast<int>(args.dim);
    const int first_channel = static_cast<int>(blockIdx.x) * kChannels;
    const int group = first_channel / (dim / args.groups);
    const int in_block = (warp * kWarpColumns + column) * 2;
    const int channel = first_channel + in_block;
    const int64_t batch = blockIdx.y;

    const Walk walk(args.seqlen, args.chunk_tiles, blockIdx.z, reverse);
    const int first_token = walk.first_token(), onward = walk.onward(), tiles = walk.tiles();
    auto boundary_row = [&](int tile, int c) {
        return direction.boundaries + ((batch * walk.total_tiles + tile) * dim + channel + c) * kStates +
               part * kQuarter;
    };
    Tiles<T>& shared = reinterpret_cast<Tiles<T>*>(vim_shared_memory)[direction_index];

    // What this thread brings in of every tile: of u, delta and z, 16 bytes of row `piece_row` (and of the row 8 on, in float32);
    // of B | C, which become float32 and so go through registers, four elements of every kBcApart-th row.
    constexpr int kPieces = kChannels * size / 16;  // of a row
    constexpr int kCopies = kPieces * kTile / kDirectionThreads;
    constexpr int kBcPieces = kChannels / 4;
    constexpr int kBcCopies = kBcPieces * kTile / kDirectionThreads;
    constexpr int kApart = kTile / kCopies, kBcApart = kTile / kBcCopies;
    const int piece_row = thread / kPieces, piece = thread % kPieces;
    const int bc_row = thread / kBcPieces, bc_piece = thread % kBcPieces;
    const bool is_C = bc_piece >= kBcPieces / 2;
    const bool gated = args.z != nullptr;
    auto start = [&](const void* data, int64_t batch_stride, int64_t token_stride, int row, int64_t bytes) {
        const int64_t elements = batch * batch_stride + (first_token + onward * row) * token_stride;
        return static_cast<const char*>(data) + elements * size + bytes;
    };
    const int64_t piece_bytes = static_cast<int64_t>(first_channel) * size + piece * 16;
    const char* u = start(direction.u, direction.u_batch, direction.u_token, piece_row, piece_bytes);
    const char* delta = start(direction.delta, direction.delta_batch, direction.delta_token, piece_row, piece_bytes);
    const char* z = gated ? start(args.z, args.z_batch, args.z_token, piece_row, piece_bytes) : nullptr;
    const char* bc = is_C ? start(direction.C, direction.C_batch, direction.C_token, bc_row,
                                  (group * direction.C_group + (bc_piece - kBcPieces / 2) * 4) * size)
                          : start(direction.B, direction.B_batch, direction.B_token, bc_row,
                                  (group * direction.B_group + bc_piece * 4) * size);
    auto stride = [&](int64_t token_stride) { return static_cast<int>(token_stride) * onward * size; };
    const int u_bytes = stride(direction.u_token), delta_bytes = stride(direction.delta_token),
              z_bytes = stride(args.z_token);
    const int bc_bytes = stride(is_C ? direction.C_token : direction.B_token);
    const int piece_place = piece_row * kChannels + (piece ^ swap_pieces<T>(piece_row)) * (16 / size);
    const int bc_place = bc_row * kChannels + bc_piece * 4;
    Quad bc_next[kBcCopies];
    int copied = 0;  // tiles
    auto copy_tile = [&](bool with_z) {
        const int buffer = copied & 1;
        const int t = first_token + onward * (copied * kTile + piece_row);
#pragma unroll
        for (int k = 0; k < kCopies; ++k) {
            const bool inside = walk.in_sequence(t + onward * k * kApart);
            const int place = piece_place + k * kApart * kChannels;
            copy_async<16>(&shared.u[buffer][place], u + k * kApart * u_bytes, inside);
            copy_async<16>(&shared.delta[buffer][place], delta + k * kApart * delta_bytes, inside);
            if (!STATES_ONLY && with_z) copy_async<16>(&shared.z[buffer][place], z + k * kApart * z_bytes, inside);
        }
        const int bc_t = first_token + onward * (copied * kTile + bc_row);
#pragma unroll
        for (int k = 0; k < kBcCopies; ++k) {
            bc_next[k] = Quad{};
            if (walk.in_sequence(bc_t + onward * k * kBcApart) && !(STATES_ONLY && is_C))
                bc_next[k] = *reinterpret_cast<const Quad*>(bc + k * kBcApart * bc_bytes);
        }
        u += kTile * u_bytes;
        delta += kTile * delta_bytes;
        if (gated) z += kTile * z_bytes;
        bc += kTile * bc_bytes;
        ++copied;
    };

    // The next tile is whole when all threads of the direction have passed this point.
    auto arrive = [&] {
#pragma unroll
        for (int k = 0; k < kBcCopies; ++k)
            *reinterpret_cast<float4*>(&shared.bc[copied & 1 ^ 1][bc_place + k * kBcApart * kChannels]) =
                float4{bc_next[k][0], bc_next[k][1], bc_next[k][2], bc_next[k][3]};
        wait_for_copies();
        if (DIRECTIONS == 1)
            __syncthreads();
        else if (direction_index == 0)
            sync_part<1, kDirectionThreads>();
        else
            sync_part<2, kDirectionThreads>();
    };
    // From this tile of its walk on a direction completes what the other has begun; direction 0 takes the middle one first.
    const int meeting = DIRECTIONS == 1 ? 0 : (tiles + 1 - direction_index) / 2;

    copy_tile(gated && meeting == 0);

    float log2_decay[2][kQuarter], state[2][kQuarter], skip[2], bias[2], step_sum[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        skip[c] = direction.D == nullptr ? 0.0f : direction.D[channel + c];
        bias[c] = direction.delta_bias == nullptr ? 0.0f : direction.delta_bias[channel + c];
        step_sum[c] = 0.0f;
#pragma unroll
        for (int n = 0; n < kQuarter; ++n) {
            const int index = part * kQuarter + n;
            log2_decay[c][n] = direction.A[(channel + c) * kStates + index] * kLog2E;
            state[c][n] = 0.0f;
            if (walk.chunks > 1) {
                if (!STATES_ONLY) state[c][n] = boundary_row(walk.tile_at(0), c)[n];
            } else if (direction.initial_state != nullptr) {
                state[c][n] = direction.initial_state[(batch * dim + channel + c) * kStates + index];
            }
        }
    }

    const bool added = DIRECTIONS == 1 && args.addend != nullptr;
    auto own_start = [&](const void* data, int64_t batch_stride, int64_t token_stride) {
        return const_cast<char*>(start(data, batch_stride, token_stride, part, static_cast<int64_t>(channel) * size));
    };
    char* out = STATES_ONLY ? nullptr : own_start(args.out, args.out_batch, args.out_token);
    // What is added to the output: the other direction's part of it, or the caller's.
    const char* onto = DIRECTIONS == 2 ? out
                       : added         ? own_start(args.addend, args.addend_batch, args.addend_token)
                                       : nullptr;
    char* ungated =
        STATES_ONLY || args.ungated == nullptr ? nullptr : own_start(args.ungated, args.seqlen * args.dim, args.dim);
    const int ungated_step = stride(args.dim) * kLanes;
    const int out_step = stride(args.out_token) * kLanes,
              onto_step = DIRECTIONS == 2 ? out_step : stride(args.addend_token) * kLanes;
    const int own_place =
        part * kChannels + ((in_block * size / 16) ^ swap_pieces<T>(part)) * (16 / size) + in_block % (16 / size);
    float4* const steps_of_column = shared.steps[warp][0] + column;
    int t = first_token + onward * part;  // this lane's token
    int slot = 0;

    arrive();

    for (int walked = 0; walked < tiles; ++walked) {
        if (DIRECTIONS == 2 && walked == meeting) __syncthreads();
        const int buffer = walked & 1;
        const bool complete = walked >= meeting;
        const bool second = DIRECTIONS == 2 && complete;
        if (walked + 1 < tiles) copy_tile(gated && walked + 1 >= meeting);
        if (args.save != 0) {
#pragma unroll
            for (int c = 0; c < 2; ++c)
                *reinterpret_cast<float4*>(boundary_row(walk.tile_at(walked), c)) =
                    float4{state[c][0], state[c][1], state[c][2], state[c][3]};
        }
        const T* own_u = shared.u[buffer] + own_place;
        const T* own_delta = shared.delta[buffer] + own_place;
        const T* own_z = shared.z[buffer] + own_place;
        const float* row = shared.bc[buffer] + part * kQuarter;
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g) {
            const bool inside = walk.in_sequence(t);
            Pair other;
            if (!STATES_ONLY && inside && (DIRECTIONS == 2 ? second : added))
                other = *reinterpret_cast<const Pair*>(onto);
            onto += onto_step;
            const Pair inputs = *reinterpret_cast<const Pair*>(own_u);
            const Pair raws = *reinterpret_cast<const Pair*>(own_delta);
            float dt[2], input[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                input[c] = inputs[c];
                dt[c] = step_of(raws[c], bias[c], args.softplus, inside);
                if (STATES_ONLY) step_sum[c] += dt[c];
            }
            // Two sets of steps, in turn: a lane that is ahead by one group overwrites none that another still reads.
            steps_of_column[slot + part * kWarpColumns] = float4{dt[0], dt[0] * input[0], dt[1], dt[1] * input[1]};
            __syncwarp();
            float y[2][kLanes];
#pragma unroll
            for (int j = 0; j < kLanes; ++j) {
                const float4 now = steps_of_column[slot + j * kWarpColumns];
                const float4 b = *reinterpret_cast<const float4*>(row + j * kChannels);
                float4 weight = {0.0f, 0.0f, 0.0f, 0.0f};
                if (!STATES_ONLY) weight = *reinterpret_cast<const float4*>(row + j * kChannels + kStates);
                y[0][j] = y[1][j] = 0.0f;
                auto advance_both = [&](int n, float b_n, float weight_n) {
                    state[0][n] = advance(state[0][n], now.x, log2_decay[0][n], now.y, b_n);
                    state[1][n] = advance(state[1][n], now.z, log2_decay[1][n], now.w, b_n);
                    y[0][j] = fmaf(weight_n, state[0][n], y[0][j]);
                    y[1][j] = fmaf(weight_n, state[1][n], y[1][j]);
                };
                advance_both(0, b.x, weight.x);
                advance_both(1, b.y, weight.y);
                advance_both(2, b.z, weight.z);
                advance_both(3, b.w, weight.w);
            }
            slot ^= 32;
            t += onward * kLanes;
            own_u += kLanes * kChannels;
            own_delta += kLanes * kChannels;
            row += kLanes * kChannels;
            if (STATES_ONLY) continue;
            float value[2];
            sum_parts<DIRECTIONS>(value, y, part, skip, input, other);
            if (ungated != nullptr) {
                store_pack<T>(ungated, value, args.scale, complete && inside);
                ungated += ungated_step;
            }
            if (complete && gated) {
                const Pair gate = *reinterpret_cast<const Pair*>(own_z);
#pragma unroll
                for (int c = 0; c < 2; ++c) value[c] *= silu(gate[c]);
            }
            own_z += kLanes * kChannels;
            store_output<T, DIRECTIONS>(out, value, args.scale, other, complete, inside);
            out += out_step;
        }
        if (walked + 1 < tiles) arrive();
    }
    if (DIRECTIONS == 2 && meeting == tiles) __syncthreads();

    leave<STATES_ONLY>(args, direction, direction_index, walk, batch, dim, channel, part, kStates, true, state,
                       step_sum, boundary_row);
}

template <typename T, int DIRECTIONS>
int launch_typed(const ScanForwardArgs& args, bool states_only, dim3 grid, void* stream) {
    const size_t shared = DIRECTIONS * sizeof(Tiles<T>);
    return states_only ? launch(scan_stream_kernel<T, DIRECTIONS, true>, grid, kDirectionThreads * DIRECTIONS, shared,
                                stream, args)
                       : launch(scan_stream_kernel<T, DIRECTIONS, false>, grid, kDirectionThreads * DIRECTIONS, shared,
                                stream, args);
}

template <typename T>
int launch_directions(const ScanForwardArgs& args, bool states_only, dim3 grid, void* stream) {
    return args.directions == 1 ? launch_typed<T, 1>(args, states_only, grid, stream)
                                : launch_typed<T, 2>(args, states_only, grid, stream);
}

}  // namespace

bool stream_fits(const ScanForwardArgs& args) {
    const int64_t size = args.type == kFloat32 ? 4 : 2;
    bool fit = args.dstate == kStates && args.dim / args.groups % kChannels == 0 &&
               rows_aligned(args.z, args.z_batch, args.z_token, size, 16) &&
               rows_aligned(args.addend, args.addend_batch, args.addend_token, size, 2 * size) &&
               rows_aligned(args.out, args.out_batch, args.out_token, size, 2 * size);
    for (int i = 0; i < args.directions; ++i) {
        const ScanDirection& direction = args.direction[i];
        fit = fit && rows_aligned(direction.u, direction.u_batch, direction.u_token, size, 16) &&
              rows_aligned(direction.delta, direction.delta_batch, direction.delta_token, size, 16) &&
              rows_aligned(direction.B, direction.B_batch, direction.B_token, size, 4 * size) &&
              rows_aligned(direction.C, direction.C_batch, direction.C_token, size, 4 * size) &&
              direction.B_group % 4 == 0 && direction.C_group % 4 == 0;
    }
    return fit;
}

int launch_stream(const ScanForwardArgs& args, bool states_only, dim3 grid, void* stream) {
    return with_element_type(
        args.type, [&](auto element) { return launch_directions<decltype(element)>(args, states_only, grid, stream); });
}

}  // namespace vim
