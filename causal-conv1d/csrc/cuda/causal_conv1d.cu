// Causal depthwise convolution with optional SiLU, token-major, forward and backward, from either end of the sequence.
//
// A thread owns CPT neighbouring channels over kSegment tokens and keeps the last kWidth inputs in registers; widths 2 to 4
// are padded to 4 with zero weights. Positions p count in scan order: token p, or seqlen - 1 - p from the far end.
#include "common/math.h"
#include "common/reduce.h"

namespace vim {

constexpr int kWidth = 4;
constexpr int kSegment = 64;
constexpr int kConvThreads = 128;

struct ConvArgs {
    const void* x;
    const float* weight;  // (dim, width)
    const float* bias;  // (dim) or null
    const void* initial_state;  // (batch, width - 1, dim) contiguous, oldest first, or null
    void* out;  // (batch, seqlen, dim)
    const void* dout;  // backward only, as the rest
    void* dx;
    void* dinitial_state;  // (batch, width - 1, dim) contiguous or null
    float* dweight;  // (dim, width)
    float* dbias;  // (dim) or null
    float* workspace;  // vim_conv_backward_workspace() floats
    int64_t x_batch, x_token, out_batch, out_token, dout_batch, dout_token, dx_batch, dx_token;
    int64_t batch, seqlen, dim;
    int32_t width, type, silu, reverse;
    int32_t accumulate_dx;  // add onto dx instead of writing it
    int32_t reserved;
};

namespace {

VIM_HD int64_t token_of(const ConvArgs& args, int64_t position) {
    return args.reverse != 0 ? args.seqlen - 1 - position : position;
}

template <typename T, int CPT>
struct Window {
    float weight[CPT][kWidth], bias[CPT], input[CPT][kWidth];  // input[.][kWidth - 1] is the newest

    VIM_DEVICE void load_parameters(const ConvArgs& args, int64_t channel) {
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
            bias[c] = args.bias == nullptr ? 0.0f : args.bias[channel + c];
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                const int tap = k - (kWidth - args.width);
                weight[c][k] = tap >= 0 ? args.weight[(channel + c) * args.width + tap] : 0.0f;
                input[c][k] = 0.0f;
            }
        }
    }

    // Input at a position, which may lie before the sequence (initial state, or zero).
    VIM_DEVICE Pack<T, CPT> fetch(const ConvArgs& args, int64_t batch, int64_t channel, int64_t position) {
        using Vector = Pack<T, CPT>;
        if (position >= 0)
            return *reinterpret_cast<const Vector*>(static_cast<const T*>(args.x) + batch * args.x_batch +
                                                    token_of(args, position) * args.x_token + channel);
        if (args.initial_state != nullptr && position >= 1 - args.width)
            return *reinterpret_cast<const Vector*>(static_cast<const T*>(args.initial_state) +
                                                    (batch * (args.width - 1) + args.width - 1 + position) * args.dim +
                                                    channel);
        Vector zero;
#pragma unroll
        for (int c = 0; c < CPT; ++c) zero.values[c] = from_float<T>(0.0f);
        return zero;
    }

    VIM_DEVICE void push(const Pack<T, CPT>& value) {
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
#pragma unroll
            for (int k = 0; k + 1 < kWidth; ++k) input[c][k] = input[c][k + 1];
            input[c][kWidth - 1] = to_float(value.values[c]);
        }
    }

    VIM_DEVICE float convolved(int c) const {
        float sum = bias[c];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum = fmaf(weight[c][k], input[c][k], sum);
        return sum;
    }
};

template <typename T, int CPT>
__global__ void __launch_bounds__(kConvThreads) conv_forward_kernel(const ConvArgs args) {
    using Vector = Pack<T, CPT>;
    const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x) * CPT;
    if (channel >= args.dim) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * kSegment;
    const int64_t end = begin + kSegment < args.seqlen ? begin + kSegment : args.seqlen;
    const int64_t batch = blockIdx.z;
    Window<T, CPT> window;
    window.load_parameters(args, channel);
    for (int64_t position = begin - (kWidth - 1); position < begin; ++position)
        window.push(window.fetch(args, batch, channel, position));
    T* out = static_cast<T*>(args.out) + batch * args.out_batch + channel;
#pragma unroll 4
    for (int64_t position = begin; position < end; ++position) {
        window.push(window.fetch(args, batch, channel, position));
        Vector result;
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
            const float value = window.convolved(c);
            result.values[c] = from_float<T>(args.silu != 0 ? silu(value) : value);
        }
        *reinterpret_cast<Vector*>(out + token_of(args, position) * args.out_token) = result;
    }
}

template <typename T, int CPT>
__global__ void __launch_bounds__(kConvThreads) conv_backward_kernel(const ConvArgs args) {
    using Vector = Pack<T, CPT>;
    const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x) * CPT;
    if (channel >= args.dim) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * kSegment;
    const int64_t end = begin + kSegment < args.seqlen ? begin + kSegment : args.seqlen;
    const int64_t batch = blockIdx.z;
    Window<T, CPT> window;
    window.load_parameters(args, channel);
    for (int64_t position = begin - (kWidth - 1); position < begin; ++position)
        window.push(window.fetch(args, batch, channel, position));
    const T* dout = static_cast<const T*>(args.dout) + batch * args.dout_batch + channel;
    T* dx = static_cast<T*>(args.dx) + batch * args.dx_batch + channel;

    float slope[CPT][kWidth], dweight[CPT][kWidth], dbias[CPT];  // slope[.][k]: gradient before SiLU, k positions ago
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
        dbias[c] = 0.0f;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) slope[c][k] = dweight[c][k] = 0.0f;
    }
    // The input at position q feeds outputs q .. q + kWidth - 1: its gradient is complete kWidth - 1 positions later, past
    // the segment's end for the last ones; the next segment computes those slopes again.
#pragma unroll 4
    for (int64_t position = begin; position < end + kWidth - 1; ++position) {
        const bool inside = position < args.seqlen;
        Vector gradient = {};
        if (inside) {
            window.push(window.fetch(args, batch, channel, position));
            gradient = *reinterpret_cast<const Vector*>(dout + token_of(args, position) * args.dout_token);
        }
        const int64_t target = position - (kWidth - 1);
        const bool in_sequence = target >= begin && target >= 0;
        const bool in_state = target < 0 && target >= 1 - args.width && args.dinitial_state != nullptr;
        T* place = in_state ? static_cast<T*>(args.dinitial_state) +
                                  (batch * (args.width - 1) + args.width - 1 + target) * args.dim + channel
                            : dx + (in_sequence ? token_of(args, target) * args.dx_token : 0);
        Vector result = {};
        if (in_sequence && args.accumulate_dx != 0) result = *reinterpret_cast<const Vector*>(place);
#pragma unroll
        for (int c = 0; c < CPT; ++c) {
#pragma unroll
            for (int k = kWidth - 1; k > 0; --k) slope[c][k] = slope[c][k - 1];
            slope[c][0] = 0.0f;
            if (inside) {
                slope[c][0] = to_float(gradient.values[c]);
                if (args.silu != 0) {
                    const float value = window.convolved(c);
                    slope[c][0] *= silu_slope(value, sigmoid(value));
                }
            }
            if (position < end) {
                dbias[c] += slope[c][0];
#pragma unroll
                for (int k = 0; k < kWidth; ++k) dweight[c][k] = fmaf(slope[c][0], window.input[c][k], dweight[c][k]);
            }
            float sum = in_sequence && args.accumulate_dx != 0 ? to_float(result.values[c]) : 0.0f;
#pragma unroll
            for (int k = 0; k < kWidth; ++k) sum = fmaf(window.weight[c][k], slope[c][k], sum);
            result.values[c] = from_float<T>(sum);
        }
        if (in_sequence || in_state) *reinterpret_cast<Vector*>(place) = result;
    }
    // Partial sums: (batch and segment, tap or bias, channel).
    float* partial =
        args.workspace + (batch * ceil_div(args.seqlen, kSegment) + blockIdx.y) * (kWidth + 1) * args.dim + channel;
#pragma unroll
    for (int c = 0; c < CPT; ++c) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) partial[k * args.dim + c] = dweight[c][k];
        partial[kWidth * args.dim + c] = dbias[c];
    }
}

// dweight and dbias: sums over rows of partial sums.
__global__ void __launch_bounds__(kSumThreads) conv_finish_kernel(const ConvArgs args) {
    const int64_t rows = args.batch * ceil_div(args.seqlen, kSegment);
    const int64_t columns = (kWidth + 1) * args.dim;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
    const bool live = column < columns;
    const float sum = sum_rows(args.workspace + column, rows, columns, live);
    if (threadIdx.x >= kSumColumns || !live) return;
    const int tap = static_cast<int>(column / args.dim);
    const int64_t channel = column % args.dim;
    const int real = tap - (kWidth - args.width);
    if (tap == kWidth) {
        if (args.dbias != nullptr) args.dbias[channel] = sum;
    } else if (real >= 0) {
        args.dweight[channel * args.width + real] = sum;
    }
}

template <typename T, int CPT>
int launch_conv(const ConvArgs& args, bool backward, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(args.dim, kConvThreads * CPT)),
                    static_cast<unsigned>(ceil_div(args.seqlen, kSegment)), static_cast<unsigned>(args.batch));
    if (!backward) return launch(conv_forward_kernel<T, CPT>, grid, kConvThreads, 0, stream, args);
    const int status = launch(conv_backward_kernel<T, CPT>, grid, kConvThreads, 0, stream, args);
    if (status != kOk) return status;
    const dim3 finish_grid(static_cast<unsigned>(ceil_div((kWidth + 1) * args.dim, kSumColumns)));
    return launch(conv_finish_kernel, finish_grid, kSumThreads, kSumThreads * sizeof(float), stream, args);
}

template <typename T>
int dispatch(const ConvArgs& args, bool backward, void* stream) {
    auto even = [](const void* data, int64_t batch_stride, int64_t token_stride) {
        return rows_aligned(data, batch_stride, token_stride, sizeof(T), 2 * sizeof(T));
    };
    const bool pairs = args.dim % 2 == 0 && even(args.x, args.x_batch, args.x_token) &&
                       even(args.out, args.out_batch, args.out_token) &&
                       even(args.dout, args.dout_batch, args.dout_token) &&
                       even(args.dx, args.dx_batch, args.dx_token) && even(args.initial_state, 0, 0) &&
                       even(args.dinitial_state, 0, 0);
    return pairs ? launch_conv<T, 2>(args, backward, stream) : launch_conv<T, 1>(args, backward, stream);
}

int run(const ConvArgs& args, bool backward, void* stream) {
    if (args.width < 2 || args.width > kWidth) return kUnsupported;
    if (args.batch >= 65536 || ceil_div(args.seqlen, kSegment) >= 65536) return kUnsupported;
    return with_element_type(args.type,
                             [&](auto element) { return dispatch<decltype(element)>(args, backward, stream); });
}

}  // namespace
}  // namespace vim

extern "C" int vim_conv_forward(const vim::ConvArgs* args, void* stream) { return vim::run(*args, false, stream); }

extern "C" int vim_conv_backward(const vim::ConvArgs* args, void* stream) { return vim::run(*args, true, stream); }

// Floats of scratch memory that vim_conv_backward needs.
extern "C" int64_t vim_conv_backward_workspace(int64_t batch, int64_t seqlen, int64_t dim) {
    return batch * vim::ceil_div(seqlen, vim::kSegment) * (vim::kWidth + 1) * dim;
}
