// Forward pass of the selective scan. Loop order: chunks of tokens outermost, then blocks of channels, then tokens, then
// states: B and C of a chunk are read once for all channels, and the state of a block stays in registers over a chunk.

#include "scan_states.h"

namespace {

struct Call {
  const ScanArgs &a;
  Cut cut;
};

// out (+)= scale * (y + D u) * SiLU(z)
void gate_tile(Target out, const float *y, View u, View z, View before, const ScanArgs &a, const float *D,
               int64_t tokens) {
  const float scale = (float)a.scale;
  for (int64_t t = 0; t < tokens; ++t)
    for (int v = 0; v < NV; ++v) {
      vf r = load(y + t * BLOCK + v * LANES) + load(D + v * LANES) * u.at(t, v);
      if (z.data)
        r *= silu(z.at(t, v));
      r *= scale;
      if (before.data)
        r += before.at(t, v);
      out.put(t, v, r);
    }
}

void forward_task(const void *args, int64_t task, int64_t) {
  const Call &call = *(const Call *)args;
  const ScanArgs &a = call.a;
  const Cut &cut = call.cut;
  const Slab s(a, cut, task);
  const int64_t n = a.states, blocks = s.last_block - s.first_block, params_floats = BlockParams::floats(a);

  const size_t bytes = (size_t)blocks * sizeof(BlockParams) +
                       (size_t)(blocks * (params_floats + n * BLOCK) + 7 * TILE + Shared::floats(a)) * 4;
  char *memory = (char *)vim::scratch(0, bytes);
  float *states = (float *)memory;
  float *params_memory = states + blocks * n * BLOCK;
  float *dt = params_memory + blocks * params_floats, *dtu = dt + TILE, *y = dtu + TILE, *delta_copy = y + TILE,
        *u_copy = delta_copy + TILE, *z_copy = u_copy + TILE, *before_copy = z_copy + TILE;
  Shared shared(before_copy + TILE, a);
  BlockParams *params = (BlockParams *)(before_copy + TILE + Shared::floats(a));

  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t channel = s.channel(cut, s.first_block + k), count = s.count(cut, s.first_block + k);
    params[k].fill(params_memory + k * params_floats, a, channel, count);
    if (a.initial_state)
      transpose_in(states + k * n * BLOCK, a.initial_state + (s.item * a.dim + channel) * n, count, n, 1.0f);
    else
      memset(states + k * n * BLOCK, 0, (size_t)(n * BLOCK) * 4);
  }
  Ahead ahead;
  ahead.columns = blocks;
  if (!a.rank)
    ahead.add(a.delta, s);
  ahead.add(a.u, s);
  ahead.add(a.z, s);
  ahead.add(a.out, s);
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    const int64_t start = chunk * SCAN_CHUNK, tokens = min_of(SCAN_CHUNK, a.len - start);
    const int64_t next = start + tokens, next_tokens = min_of(SCAN_CHUNK, a.len - next);
    ahead.aim_chunk(s, next, next_tokens, s.channel(cut, s.first_block));
    shared.fill(a, s, start, tokens);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t block = s.first_block + k, channel = s.channel(cut, block), count = s.count(cut, block);
      const BlockParams &p = params[k];
      float *h = states + k * n * BLOCK;
      if (a.saved) {
        const int64_t at = ((s.item * cut.chunks + chunk) * a.groups + s.group) * cut.blocks + block;
        memcpy(a.saved + at * n * BLOCK, h, (size_t)(n * BLOCK) * 4);
      }
      const View u = load_tile(u_copy, a.u, s, start, tokens, channel, count);
      const View delta = a.rank ? View{} : load_tile(delta_copy, a.delta, s, start, tokens, channel, count);
      const bool small = step_tile(dt, dtu, nullptr, a, p, shared, delta, u, tokens);
      const float *B = a.b_constant ? p.B : shared.B, *C = a.c_constant ? p.C : shared.C;
      const Run r{tokens, n, dt, dtu, B, C, p.log2_decay, h, y, y, y, &ahead};
      if (k + 1 < blocks)
        ahead.aim_tile(s, start, tokens, s.channel(cut, block + 1));
      else
        ahead.aim_tile(s, next, next_tokens, s.channel(cut, s.first_block));
      for (int64_t first = 0; first < n; first += MOST_STATES) {
        const int64_t group = min_of(n - first, MOST_STATES);
        small ? run_group<true, false>(a, r, first, group) : run_group<false, false>(a, r, first, group);
      }
      const View z = a.z.data ? load_tile(z_copy, a.z, s, start, tokens, channel, count) : View{};
      const View before = a.accumulate ? load_tile(before_copy, a.out, s, start, tokens, channel, count) : View{};
      const Target out = target_tile(y, a.out, s, start, channel, count);
      gate_tile(out, y, u, z, before, a, p.D, tokens);
      finish(out, a.out, s, start, tokens, channel, count);
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
