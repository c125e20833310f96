// What follows the backward scan: sums over chunks of time, blocks of channels and batch rows, each in a fixed order.
#include "common/reduce.h"
#include "scan_backward.h"

namespace vim {
namespace {

// What a chunk of time adds to the adjoint from zero becomes the adjoint on entering it.
__global__ void __launch_bounds__(256) join_adjoints_kernel(const ScanBackwardArgs args) {
    const ScanBackwardDirection& direction = args.direction[blockIdx.z];
    const int states = padded_states(args.dstate);
    const BackwardPlan plan = plan_of(args);
    float* workspace = args.workspace + blockIdx.z * plan.floats;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= args.dim * states) return;
    const int64_t channel = index / states, n = index % states, batch = blockIdx.y;
    const bool real = n < args.dstate;
    const float log2_decay = real ? direction.in.A[channel * args.dstate + n] * kLog2E : 0.0f;
    float entering = real && direction.dlast_state != nullptr
                         ? direction.dlast_state[(batch * args.dim + channel) * args.dstate + n]
                         : 0.0f;
    for (int64_t walked = 0; walked < plan.chunks; ++walked) {
        const int64_t chunk = direction.in.reverse != 0 ? walked : plan.chunks - 1 - walked;
        const int64_t row = (batch * plan.chunks + chunk) * args.dim + channel;
        float& place = workspace[plan.adjoints + row * states + n];
        const float added = place;
        place = entering;
        entering = fmaf(exp2_fast(log2_decay * workspace[plan.steps + row]), entering, added);
    }
}

// dB and dC: the sum over the blocks of channels of each group, in order, in the inputs' type.
template <typename T, int STATES>
__global__ void __launch_bounds__(256) finish_bc_kernel(const ScanBackwardArgs args) {
    const ScanBackwardDirection& direction = args.direction[blockIdx.z];
    constexpr int kRow = 2 * STATES;
    const int64_t rows = args.batch * args.seqlen;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= rows * kRow) return;
    const int64_t group = blockIdx.y, row = index / kRow;
    const int column = static_cast<int>(index % kRow), n = column % STATES;
    if (n >= args.dstate) return;
    const BackwardPlan plan = plan_of(args);
    const float* partial =
        args.workspace + blockIdx.z * plan.floats + plan.bc + (group * plan.blocks * rows + row) * kRow + column;
    float sum = 0.0f;
    for (int64_t block = 0; block < plan.blocks; ++block) sum += partial[block * rows * kRow];
    T* target = static_cast<T*>(column < STATES ? direction.dB : direction.dC);
    target[row * args.dbc_token + group * args.dbc_group + n] = from_float<T>(sum);
}

// dA, dD and ddelta_bias: sums over the batch and the chunks of time.
__global__ void __launch_bounds__(kSumThreads) finish_parameters_kernel(const ScanBackwardArgs args) {
    const ScanBackwardDirection& direction = args.direction[blockIdx.z];
    const BackwardPlan plan = plan_of(args);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
    const int64_t matrix = args.dim * args.dstate;
    const bool live = index < matrix + 2 * args.dim;
    const bool in_matrix = index < matrix;
    const int64_t stride = in_matrix ? matrix : 2 * args.dim;
    const int64_t place = in_matrix ? index : index - matrix;
    const float* partial = args.workspace + blockIdx.z * plan.floats + (in_matrix ? plan.dA : plan.channel) + place;
    const float sum = sum_rows(partial, args.batch * plan.chunks, stride, live);
    if (threadIdx.x >= kSumColumns || !live) return;
    float* target = in_matrix ? direction.dA : place < args.dim ? direction.dD : direction.ddelta_bias;
    if (target != nullptr) target[!in_matrix && place >= args.dim ? place - args.dim : place] = sum;
}

template <typename T, int STATES>
int launch_finish_bc(const ScanBackwardArgs& args, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(args.batch * args.seqlen * 2 * STATES, 256)),
                    static_cast<unsigned>(args.groups), static_cast<unsigned>(args.directions));
    return launch(finish_bc_kernel<T, STATES>, grid, 256, 0, stream, args);
}

template <typename T>
int finish_bc(const ScanBackwardArgs& args, void* stream) {
    switch (padded_states(args.dstate)) {
    case 16:
        return launch_finish_bc<T, 16>(args, stream);
    case 32:
        return launch_finish_bc<T, 32>(args, stream);
    default:
        return launch_finish_bc<T, 64>(args, stream);
    }
}

}  // namespace

int join_adjoints(const ScanBackwardArgs& args, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(args.dim * padded_states(args.dstate), 256)),
                    static_cast<unsigned>(args.batch), static_cast<unsigned>(args.directions));
    return launch(join_adjoints_kernel, grid, 256, 0, stream, args);
}

int finish_gradients(const ScanBackwardArgs& args, void* stream) {
    const int status =
        with_element_type(args.type, [&](auto element) { return finish_bc<decltype(element)>(args, stream); });
    if (status != kOk) return status;
    const dim3 grid(static_cast<unsigned>(ceil_div(args.dim * (args.dstate + 2), kSumColumns)), 1,
                    static_cast<unsigned>(args.directions));
    return launch(finish_parameters_kernel, grid, kSumThreads, kSumThreads * sizeof(float), stream, args);
}

}  // namespace vim
