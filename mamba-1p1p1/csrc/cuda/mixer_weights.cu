// The projections of a mixer's directions as its matrix products want them, in one launch instead of a cast for each: in the
// activations' type, directions stacked, and the rank of dt padded with zeros so that rows start on multiples of 16 bytes.
#include "scan.h"

namespace vim {

struct MixerWeightsArgs {
    const void* x_proj[2];  // (rank + columns, dim) contiguous
    const void* dt_proj[2];  // (dim, rank) contiguous
    void* x_out;  // (directions, rank + pad + columns, dim)
    void* dt_out;  // (directions, dim, rank + pad)
    int64_t dim;
    int32_t rank, pad, columns;  // columns: of B and C together
    int32_t directions, in_type, out_type;
};

namespace {

__global__ void __launch_bounds__(256) mixer_weights_kernel(const MixerWeightsArgs args) {
    const int wide = args.rank + args.pad;
    const int64_t x_count = (wide + args.columns) * args.dim, count = x_count + args.dim * wide;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int direction = blockIdx.y;
    if (index >= count) return;
    if (index < x_count) {
        const int64_t row = index / args.dim;
        const bool padding = row >= args.rank && row < wide;
        const int64_t from = row < args.rank ? index : index - args.pad * args.dim;
        store_any(args.x_out, direction * x_count + index, args.out_type,
                  padding ? 0.0f : load_any(args.x_proj[direction], from, args.in_type));
    } else {
        const int64_t place = index - x_count, channel = place / wide, column = place % wide;
        store_any(args.dt_out, direction * args.dim * wide + place, args.out_type,
                  column >= args.rank ? 0.0f
                                      : load_any(args.dt_proj[direction], channel * args.rank + column, args.in_type));
    }
}

}  // namespace
}  // namespace vim

extern "C" int vim_mixer_weights(const vim::MixerWeightsArgs* args, void* stream) {
    using namespace vim;
    const int64_t wide = args->rank + args->pad, count = (wide + args->columns) * args->dim + args->dim * wide;
    const dim3 grid(static_cast<unsigned>(ceil_div(count, 256)), static_cast<unsigned>(args->directions));
    return launch(mixer_weights_kernel, grid, 256, 0, stream, *args);
}
