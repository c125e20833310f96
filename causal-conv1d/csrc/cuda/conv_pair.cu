// The two convolutions of a bidirectional mixer at once: one along the tokens, one against them, of the same input.
//
// With x[t .. t+3] at hand, a thread makes output t + 3 of the first and output t of the second; the same four rows serve
// both gradients. A thread owns CPT neighbouring channels over a run of positions t, which start at -3, and loads four rows
// ahead. Widths 2 to 4 are padded to 4 with zero weights.
#include "common/math.h"
#include "common/reduce.h"

namespace vim {

constexpr int kTaps = 4;
constexpr int kPairThreads = 128;
constexpr int kForwardRun = 32;  // positions of a thread
constexpr int kBackwardRun = 64;  // tokens of a thread
constexpr int kAhead = 4;  // rows loaded together

struct ConvPairArgs {
    const void* x;  // (batch, seqlen, dim)
    const float* weight[2];  // (dim, width): along the tokens, against them; the last tap meets the token itself
    const float* bias[2];  // (dim) or null
    void* out[2];  // (batch, seqlen, dim) contiguous
    const void* dout[2];  // (batch, seqlen, dim) contiguous; backward only, as the rest
    void* dx;
    float* dweight[2];  // (dim, width)
    float* dbias[2];  // (dim) or null
    float* workspace;  // vim_conv_pair_workspace() floats
    int64_t x_batch, x_token, dx_batch, dx_token;
    int64_t batch, seqlen, dim;
    int32_t width, type;
};

namespace {

template <int CPT>
struct Filters {
    float weight[2][kTaps][CPT], bias[2][CPT];

    VIM_DEVICE void load(const ConvPairArgs& args, int64_t channel) {
#pragma unroll
        for (int direction = 0; direction < 2; ++direction)
#pragma unroll
            for (int c = 0; c < CPT; ++c) {
                bias[direction][c] = args.bias[direction] == nullptr ? 0.0f : args.bias[direction][channel + c];
#pragma unroll
                for (int k = 0; k < kTaps; ++k) {
                    const int tap = k - (kTaps - args.width);
                    weight[direction][k][c] =
                        tap >= 0 ? args.weight[direction][(channel + c) * args.width + tap] : 0.0f;
                }
            }
    }

    // What the direction's SiLU sees, given the rows x[t .. t+3].
    VIM_DEVICE float sum(int direction, const float (*rows)[CPT], int c) const {
        float total = bias[direction][c];
#pragma unroll
        for (int k = 0; k < kTaps; ++k)
            total = fmaf(weight[direction][k][c], rows[direction == 0 ? k : kTaps - 1 - k][c], total);
        return total;
    }
};

// Row t, or zeros outside the sequence.
template <typename T, int CPT>
VIM_DEVICE Pack<T, CPT> row_at(const T* base, int t, int seqlen, int64_t stride) {
    Pack<T, CPT> row = {};
    if (t >= 0 && t < seqlen) row = *reinterpret_cast<const Pack<T, CPT>*>(base + t * stride);
    return row;
}

template <typename T, int CPT>
VIM_DEVICE void widen(const Pack<T, CPT>& row, float (&target)[CPT]) {
#pragma unroll
    for (int c = 0; c < CPT; ++c) target[c] = to_float(row.values[c]);
}

template <typename T, int CPT>
__global__ void __launch_bounds__(kPairThreads) conv_pair_forward_kernel(const ConvPairArgs args) {
    using Vector = Pack<T, CPT>;
    const int seqlen = static_cast<int>(args.seqlen);
    const int columns = static_cast<int>(args.dim) / CPT;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x;
    const int begin = static_cast<int>(index / columns) * kForwardRun - (kTaps - 1);
    if (begin >= seqlen) return;
    const int end = begin + kForwardRun < seqlen ? begin + kForwardRun : seqlen;
    const int64_t channel = index % columns * CPT;
    const int64_t batch = blockIdx.y;
    const T* x = static_cast<const T*>(args.x) + batch * args.x_batch + channel;
    T* const out0 = static_cast<T*>(args.out[0]) + batch * seqlen * args.dim + channel;
    T* const out1 = static_cast<T*>(args.out[1]) + batch * seqlen * args.dim + channel;
    Filters<CPT> filters;
    filters.load(args, channel);

    float rows[kTaps - 1 + kAhead][CPT];  // x[t .. t + 6]
#pragma unroll
    for (int k = 0; k < kTaps - 1 + kAhead; ++k)
        widen<T, CPT>(row_at<T, CPT>(x, begin + k, seqlen, args.x_token), rows[k]);
    for (int t = begin; t < end; t += kAhead) {
        Vector next[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) next[k] = row_at<T, CPT>(x, t + kTaps - 1 + kAhead + k, seqlen, args.x_token);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            Vector along, against;
#pragma unroll
            for (int c = 0; c < CPT; ++c) {
                along.values[c] = from_float<T>(silu(filters.sum(0, rows + i, c)));
                against.values[c] = from_float<T>(silu(filters.sum(1, rows + i, c)));
            }
            const int first = t + i + kTaps - 1, second = t + i;
            if (second < end && first < seqlen) *reinterpret_cast<Vector*>(out0 + first * args.dim) = along;
            if (second < end && second >= 0) *reinterpret_cast<Vector*>(out1 + second * args.dim) = against;
        }
#pragma unroll
        for (int k = 0; k < kTaps - 1; ++k)
#pragma unroll
            for (int c = 0; c < CPT; ++c) rows[k][c] = rows[k + kAhead][c];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) widen<T, CPT>(next[k], rows[kTaps - 1 + k]);
    }
}

template <typename T, int CPT>
__global__ void __launch_bounds__(kPairThreads) conv_pair_backward_kernel(const ConvPairArgs args) {
    using Vector = Pack<T, CPT>;
    const int seqlen = static_cast<int>(args.seqlen);
    const int columns = static_cast<int>(args.dim) / CPT;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x;
    const int run = static_cast<int>(index / columns);
    const int begin = run * kBackwardRun;
    if (begin >= seqlen) return;
    const int end = begin + kBackwardRun < seqlen ? begin + kBackwardRun : seqlen;
    const int64_t channel = index % columns * CPT;
    const int64_t batch = blockIdx.y;
    const T* x = static_cast<const T*>(args.x) + batch * args.x_batch + channel;
    const T* dout[2];
#pragma unroll
    for (int direction = 0; direction < 2; ++direction)
        dout[direction] = static_cast<const T*>(args.dout[direction]) + batch * seqlen * args.dim + channel;
    T* dx = static_cast<T*>(args.dx) + batch * args.dx_batch + channel;
    Filters<CPT> filters;
    filters.load(args, channel);

    float dweight[2][kTaps][CPT], dbias[2][CPT];
    // Gradients of what the SiLUs see: slope[0][k] of output t + k along, slope[1][k] of output t - k against the tokens.
    float slope[2][kTaps][CPT];
#pragma unroll
    for (int direction = 0; direction < 2; ++direction)
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
            dbias[direction][c] = 0.0f;
#pragma unroll
            for (int k = 0; k < kTaps; ++k) slope[direction][k][c] = dweight[direction][k][c] = 0.0f;
        }
    // Three positions before the run fill the slopes; `begin - kAhead` keeps the steps of four whole.
    float rows[kTaps - 1 + kAhead][CPT];
    Vector now[2][kAhead];
    auto fetch = [&](int t, Vector(&target)[2][kAhead]) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            target[0][k] = row_at<T, CPT>(dout[0], t + kTaps - 1 + k, seqlen, args.dim);
            target[1][k] = row_at<T, CPT>(dout[1], t + k, seqlen, args.dim);
        }
    };
#pragma unroll
    for (int k = 0; k < kTaps - 1 + kAhead; ++k)
        widen<T, CPT>(row_at<T, CPT>(x, begin - kAhead + k, seqlen, args.x_token), rows[k]);
    fetch(begin - kAhead, now);
    for (int t0 = begin - kAhead; t0 < end; t0 += kAhead) {
        Vector next[kAhead], later[2][kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) next[k] = row_at<T, CPT>(x, t0 + kTaps - 1 + kAhead + k, seqlen, args.x_token);
        fetch(t0 + kAhead, later);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int t = t0 + i;
            Vector result;
#pragma unroll
            for (int c = 0; c < CPT; ++c) {
                float total = 0.0f;
#pragma unroll
                for (int direction = 0; direction < 2; ++direction) {
#pragma unroll
                    for (int k = 0; k + 1 < kTaps; ++k) {
                        const int to = direction == 0 ? k : kTaps - 1 - k;
                        slope[direction][to][c] = slope[direction][direction == 0 ? to + 1 : to - 1][c];
                    }
                    const float value = filters.sum(direction, rows + i, c);
                    const float made = to_float(now[direction][i].values[c]) * silu_slope(value, sigmoid(value));
                    slope[direction][direction == 0 ? kTaps - 1 : 0][c] = made;
                    const int output = direction == 0 ? t + kTaps - 1 : t;
                    const float counted = output >= begin && output < end ? made : 0.0f;
                    dbias[direction][c] += counted;
#pragma unroll
                    for (int k = 0; k < kTaps; ++k)
                        dweight[direction][k][c] =
                            fmaf(counted, rows[i + (direction == 0 ? k : kTaps - 1 - k)][c], dweight[direction][k][c]);
#pragma unroll
                    for (int k = 0; k < kTaps; ++k)
                        total = fmaf(filters.weight[direction][kTaps - 1 - k][c], slope[direction][k][c], total);
                }
                result.values[c] = from_float<T>(total);
            }
            if (t >= begin && t < end) *reinterpret_cast<Vector*>(dx + t * args.dx_token) = result;
        }
#pragma unroll
        for (int k = 0; k < kTaps - 1; ++k)
#pragma unroll
            for (int c = 0; c < CPT; ++c) rows[k][c] = rows[k + kAhead][c];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            widen<T, CPT>(next[k], rows[kTaps - 1 + k]);
            now[0][k] = later[0][k], now[1][k] = later[1][k];
        }
    }
    // Partial sums: (batch and run, direction, tap or bias, channel).
    const int64_t runs = ceil_div(seqlen, kBackwardRun);
    float* partial = args.workspace + (batch * runs + run) * 2 * (kTaps + 1) * args.dim + channel;
#pragma unroll
    for (int direction = 0; direction < 2; ++direction)
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
#pragma unroll
            for (int k = 0; k < kTaps; ++k)
                partial[(direction * (kTaps + 1) + k) * args.dim + c] = dweight[direction][k][c];
            partial[(direction * (kTaps + 1) + kTaps) * args.dim + c] = dbias[direction][c];
        }
}

__global__ void __launch_bounds__(kSumThreads) conv_pair_finish_kernel(const ConvPairArgs args) {
    const int64_t rows = args.batch * ceil_div(args.seqlen, kBackwardRun);
    const int64_t columns = 2 * (kTaps + 1) * args.dim;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
    const bool live = column < columns;
    const float sum = sum_rows(args.workspace + column, rows, columns, live);
    if (threadIdx.x >= kSumColumns || !live) return;
    const int direction = static_cast<int>(column / ((kTaps + 1) * args.dim));
    const int tap = static_cast<int>(column / args.dim) % (kTaps + 1);
    const int64_t channel = column % args.dim;
    const int real = tap - (kTaps - args.width);
    if (tap == kTaps) {
        if (args.dbias[direction] != nullptr) args.dbias[direction][channel] = sum;
    } else if (real >= 0) {
        args.dweight[direction][channel * args.width + real] = sum;
    }
}

template <typename T, int CPT>
int launch_pair(const ConvPairArgs& args, bool backward, void* stream) {
    const int64_t columns = args.dim / CPT;
    const int64_t runs =
        backward ? ceil_div(args.seqlen, kBackwardRun) : ceil_div(args.seqlen + kTaps - 1, kForwardRun);
    const dim3 grid(static_cast<unsigned>(ceil_div(columns * runs, kPairThreads)), static_cast<unsigned>(args.batch));
    if (!backward) return launch(conv_pair_forward_kernel<T, CPT>, grid, kPairThreads, 0, stream, args);
    const int status = launch(conv_pair_backward_kernel<T, CPT>, grid, kPairThreads, 0, stream, args);
    if (status != kOk) return status;
    const dim3 finish_grid(static_cast<unsigned>(ceil_div(2 * (kTaps + 1) * args.dim, kSumColumns)));
    return launch(conv_pair_finish_kernel, finish_grid, kSumThreads, kSumThreads * sizeof(float), stream, args);
}

template <typename T>
int dispatch_pair(const ConvPairArgs& args, bool backward, void* stream) {
    auto even = [](const void* data, int64_t batch_stride, int64_t token_stride) {
        return rows_aligned(data, batch_stride, token_stride, sizeof(T), 2 * sizeof(T));
    };
    const bool pairs = args.dim % 2 == 0 && even(args.x, args.x_batch, args.x_token) &&
                       even(args.dx, args.dx_batch, args.dx_token) && even(args.out[0], 0, 0) &&
                       even(args.out[1], 0, 0) && even(args.dout[0], 0, 0) && even(args.dout[1], 0, 0);
    return pairs ? launch_pair<T, 2>(args, backward, stream) : launch_pair<T, 1>(args, backward, stream);
}

int run_pair(const ConvPairArgs& args, bool backward, void* stream) {
    if (args.width < 2 || args.width > kTaps || args.batch >= 65536) return kUnsupported;
    if (args.seqlen >= (int64_t{1} << 31) - kBackwardRun || args.dim * args.seqlen / kForwardRun >= (int64_t{1} << 36))
        return kUnsupported;
    return with_element_type(args.type,
                             [&](auto element) { return dispatch_pair<decltype(element)>(args, backward, stream); });
}

}  // namespace
}  // namespace vim

extern "C" int vim_conv_pair_forward(const vim::ConvPairArgs* args, void* stream) {
    return vim::run_pair(*args, false, stream);
}

extern "C" int vim_conv_pair_backward(const vim::ConvPairArgs* args, void* stream) {
    return vim::run_pair(*args, true, stream);
}

// Floats of scratch memory that vim_conv_pair_backward needs.
extern "C" int64_t vim_conv_pair_workspace(int64_t batch, int64_t seqlen, int64_t dim) {
    return batch * vim::ceil_div(seqlen, vim::kBackwardRun) * 2 * (vim::kTaps + 1) * dim;
}
