// Forward pass of the selective scan. Loop order: chunks of tokens outermost, then blocks of channels, then tokens, then
// states: B and C of a chunk are read once for all channels, and the state of a block stays in registers over a chunk.

#include "scan_tile.h"

namespace {

struct Call {
  const ScanArgs &a;
  Cut cut;
};

void gate_tile(float *y, const float *u, const float *z, const float *before, const ScanArgs &a, const float *D,
               int64_t tokens) {
  const float scale = (float)a.scale;
  for (int64_t t = 0; t < tokens; ++t)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * BLOCK + v * LANES;
      vf r = load(y + at) + load(D + v * LANES) * load(u + at);
      if (z)
        r *= silu(load(z + at));
      r *= scale;
      if (before)
        r += load(before + at);
      store(y + at, r);
    }
}

void forward_task(const void *args, int64_t task, int64_t) {
  const Call &call = *(const Call *)args;
  const ScanArgs &a = call.a;
  const Cut &cut = call.cut;
  const Slab s(a, cut, task);
  const int64_t n = a.states, blocks = s.last_block - s.first_block, params_floats = BlockParams::floats(a);

  const size_t bytes = (size_t)blocks * sizeof(BlockParams) +
                       (size_t)(blocks * (params_floats + n * BLOCK) + 6 * TILE + Shared::floats(a)) * 4;
  char *memory = (char *)vim::scratch(0, bytes);
  float *states = (float *)memory;
  float *params_memory = states + blocks * n * BLOCK;
  float *dt = params_memory + blocks * params_floats, *u = dt + TILE, *dtu = u + TILE, *z = dtu + TILE, *y = z + TILE,
        *before = y + TILE;
  Shared shared(before + TILE, a);
  BlockParams *params = (BlockParams *)(before + TILE + Shared::floats(a));

  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t channel = s.channel(cut, s.first_block + k), count = s.count(cut, s.first_block + k);
    params[k].fill(params_memory + k * params_floats, a, channel, count);
    if (a.initial_state)
      transpose_in(states + k * n * BLOCK, a.initial_state + (s.item * a.dim + channel) * n, count, n, 1.0f);
    else
      memset(states + k * n * BLOCK, 0, (size_t)(n * BLOCK) * 4);
  }
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    const int64_t start = chunk * SCAN_CHUNK, tokens = min_of(SCAN_CHUNK, a.len - start);
    shared.fill(a, s, start, tokens);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t block = s.first_block + k, channel = s.channel(cut, block), count = s.count(cut, block);
      const BlockParams &p = params[k];
      float *h = states + k * n * BLOCK;
      if (a.saved) {
        const int64_t at = ((s.item * cut.chunks + chunk) * a.groups + s.group) * cut.blocks + block;
        memcpy(a.saved + at * n * BLOCK, h, (size_t)(n * BLOCK) * 4);
      }
      load_tile(u, a.u, s, start, tokens, channel, count);
      if (!a.rank)
        load_tile(dt, a.delta, s, start, tokens, channel, count);
      const bool small = step_tile(dt, nullptr, a, p, shared, tokens);
      for (int64_t i = 0; i < tokens * BLOCK; i += LANES)
        store(dtu + i, load(dt + i) * load(u + i));
      if (small)
        run_tile_for<true, false>(a, p, shared, tokens, dt, dtu, h, y, nullptr, nullptr);
      else
        run_tile_for<false, false>(a, p, shared, tokens, dt, dtu, h, y, nullptr, nullptr);
      if (a.z.data)
        load_tile(z, a.z, s, start, tokens, channel, count);
      if (a.accumulate)
        load_tile(before, a.out, s, start, tokens, channel, count);
      gate_tile(y, u, a.z.data ? z : nullptr, a.accumulate ? before : nullptr, a, p.D, tokens);
      store_tile(y, a.out, s, start, tokens, channel, count);
    }
  }
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t channel = s.channel(cut, s.first_block + k), count = s.count(cut, s.first_block + k);
    transpose_out(a.last_state + (s.item * a.dim + channel) * n, states + k * n * BLOCK, count, n);
  }
}

void forward(const ScanArgs *args) {
  const Call call{*args, Cut(*args, true)};
  vim::parallel(args->batch * args->groups * call.cut.slabs, args->threads, forward_task, &call);
}

}  // namespace

namespace VIM_ISA {
void (*scan_forward)(const ScanArgs *) = forward;
}
