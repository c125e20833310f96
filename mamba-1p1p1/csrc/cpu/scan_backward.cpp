// Backward pass of the selective scan. Chunks run from the last to the first in scan order; the states inside a chunk
// are recomputed from the state kept before it. Sums over channels (for B, C and the low-rank step) are kept per lane over
// the blocks of a slab, folded once per chunk, and added over slabs in a fixed order afterwards.

#include "scan_adjoint.h"

namespace {

struct Call {
  const ScanGradArgs &g;
  Cut cut;
  int64_t width;  // rank + 2 * states
  float *partial;  // (B, G, slabs, L, width)
  float *items;  // (B, E, per_channel): this batch item's share of the parameter gradients
  int64_t per_channel;
};

// The gradient of the low-rank step, summed over the channels of a block: low_grad (rank, SCAN_CHUNK) += weight ddt^T.
// With tokens across the lanes nothing has to be folded. `turned` is room for a transposed tile.
void low_rank_grad(float *low_grad, float *dweight, float *turned, const float *ddt, const BlockParams &p,
                   const Shared &shared, int64_t rank, int64_t tokens) {
  for (int64_t t = 0; t < SCAN_CHUNK; t += LANES)
    for (int64_t c = 0; c < BLOCK; c += LANES)
      transpose_square(turned + c * SCAN_CHUNK + t, SCAN_CHUNK, ddt + t * BLOCK + c, BLOCK);
  constexpr int AT_ONCE = 4;
  for (int64_t r = 0; r < rank; r += AT_ONCE) {
    const int64_t count = min_of(AT_ONCE, rank - r);
    // Short groups repeat their last row, so that the loops inside have a fixed length.
    int64_t rows[AT_ONCE];
    for (int i = 0; i < AT_ONCE; ++i)
      rows[i] = min_of(r + i, rank - 1);
    for (int64_t t = 0; t < SCAN_CHUNK; t += LANES) {
      vf sum[AT_ONCE];
#pragma GCC unroll 4
      for (int i = 0; i < AT_ONCE; ++i)
        sum[i] = load(low_grad + rows[i] * SCAN_CHUNK + t);
      for (int64_t c = 0; c < BLOCK; ++c) {
        const vf x = load(turned + c * SCAN_CHUNK + t);
#pragma GCC unroll 4
        for (int i = 0; i < AT_ONCE; ++i)
          sum[i] += p.dt_weight[rows[i] * BLOCK + c] * x;
      }
      for (int64_t i = 0; i < count; ++i)
        store(low_grad + rows[i] * SCAN_CHUNK + t, sum[i]);
    }
    for (int v = 0; v < NV; ++v) {
      vf sum[AT_ONCE];
#pragma GCC unroll 4
      for (int i = 0; i < AT_ONCE; ++i)
        sum[i] = load(dweight + rows[i] * BLOCK + v * LANES);
      for (int64_t t = 0; t < tokens; ++t) {
        const vf x = load(ddt + t * BLOCK + v * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < AT_ONCE; ++i)
          sum[i] += shared.low_rank[t * rank + rows[i]] * x;
      }
      for (int64_t i = 0; i < count; ++i)
        store(dweight + rows[i] * BLOCK + v * LANES, sum[i]);
    }
  }
}

// Scratch memory of one task.
struct Work {
  static constexpr int64_t TILES = 17;
  // Of one group of states over a tile: (tokens, states, BLOCK).
  float *kept_h, *kept_decay;
  // Of a chunk, summed over blocks: (tokens, 2 * states) and (rank, SCAN_CHUNK), one after the other.
  float *dBC, *low_grad;
  float *h;  // (states, BLOCK)
  // Of a tile.
  float *dt, *dtu, *y, *dy, *slope, *gate_slope, *dtu_grad, *dt_grad, *turned;
  float *u_copy, *delta_copy, *z_copy, *dout_copy, *dz_copy, *earlier_copy, *du_copy, *ddelta_copy;
  Shared shared;
  // Of every block of the slab.
  BlockParams *params;
  BlockSums *sums;

  Work(const ScanGradArgs &g, const Cut &cut, const Slab &s) : shared(nullptr, g.in) {
    const ScanArgs &a = g.in;
    const int64_t n = a.states, blocks = s.last_block - s.first_block;
    const int64_t params_floats = BlockParams::floats(a), sums_floats = BlockSums::rows(a) * BLOCK;
    const int64_t kept = SCAN_CHUNK * min_of(n, KEPT_STATES) * BLOCK;
    const int64_t floats = 2 * kept + SCAN_CHUNK * (2 * n + a.rank) + n * BLOCK + TILES * TILE + Shared::floats(a) +
                           blocks * (params_floats + sums_floats);
    const size_t structs = (size_t)blocks * (sizeof(BlockParams) + sizeof(BlockSums));
    float *next = (float *)vim::scratch(0, (size_t)floats * 4 + structs);
    const auto take = [&](int64_t count) { return next += count, next - count; };
    kept_h = take(kept), kept_decay = take(kept);
    dBC = take(SCAN_CHUNK * 2 * n), low_grad = take(SCAN_CHUNK * a.rank), h = take(n * BLOCK);
    float **const tiles[TILES] = {&dt,           &dtu,     &y,          &dy,         &slope,  &gate_slope, &dtu_grad,
                                  &dt_grad,      &turned,  &u_copy,     &delta_copy, &z_copy, &dout_copy,  &dz_copy,
                                  &earlier_copy, &du_copy, &ddelta_copy};
    for (float **tile : tiles)
      *tile = take(TILE);
    shared = Shared(take(Shared::floats(a)), a);
    float *params_memory = take(blocks * params_floats), *sums_memory = take(blocks * sums_floats);
    params = (BlockParams *)next;
    sums = (BlockSums *)(params + blocks);

    memset(sums_memory, 0, (size_t)(blocks * sums_floats) * 4);
    // Rows of a short last chunk are transposed along with the others.
    memset(ddelta_copy, 0, TILE * 4);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t channel = s.channel(cut, s.first_block + k), count = s.count(cut, s.first_block + k);
      params[k].fill(params_memory + k * params_floats, a, channel, count);
      sums[k].place(sums_memory + k * sums_floats, a);
      if (g.dlast_state)
        transpose_in(sums[k].state, g.dlast_state + (s.item * a.dim + channel) * n, count, n, 1.0f);
    }
  }
};

// One tile: `tokens` tokens from `start` on (in scan order) of `count` channels.
struct Place {
  int64_t start, tokens, channel, count;
};

// dy = dL/dy_t before the skip and the gate; gate_slope = dL/dz divided by y_t + D u_t.
void grad_before_gate(const Work &w, float *sum_of_D, float scale, View u, View dout, View z, int64_t tokens) {
  for (int v = 0; v < NV; ++v) {
    vf sum_D = load(sum_of_D + v * LANES);
    for (int64_t t = 0; t < tokens; ++t) {
      vf to_y = dout.at(t, v) * scale;
      if (z.data) {
        const vf gate = z.at(t, v), sig = sigmoid(gate), along = to_y * sig;
        store(w.gate_slope + t * BLOCK + v * LANES, along * (1.0f + gate * (1.0f - sig)));
        to_y = along * gate;
      }
      store(w.dy + t * BLOCK + v * LANES, to_y);
      sum_D += to_y * u.at(t, v);
    }
    store(sum_of_D + v * LANES, sum_D);
  }
}

// The states and their adjoint over the tile, group by group: y, dtu_grad, dt_grad and the sums over states and channels.
void run_states_and_adjoint(const ScanArgs &a, const Work &w, const BlockParams &p, const BlockSums &sum,
                            const float *before, bool small, int64_t tokens, Ahead *ahead) {
  const int64_t n = a.states;
  memcpy(w.h, before, (size_t)(n * BLOCK) * 4);
  const float *B = a.b_constant ? p.B : w.shared.B, *C = a.c_constant ? p.C : w.shared.C;
  const Run run{tokens, n, w.dt, w.dtu, B, C, p.log2_decay, w.h, w.y, w.kept_h, w.kept_decay, ahead};
  const Adjoint adjoint{tokens, n,        w.dt,         w.dtu, w.dy,  B,          C,         p.log2_decay,
                        before, w.kept_h, w.kept_decay, sum,   w.dBC, w.dtu_grad, w.dt_grad, ahead};
  for (int64_t first = 0; first < n; first += KEPT_STATES) {
    const int64_t group = min_of(n - first, KEPT_STATES);
    small ? run_group<true, true>(a, run, first, group) : run_group<false, true>(a, run, first, group);
    adjoint_group(a, adjoint, first, group);
  }
}

void store_dz(const ScanGradArgs &g, const Work &w, const Slab &s, const BlockParams &p, View u, const Place &at) {
  const View earlier =
      g.accumulate_dz ? load_tile(w.earlier_copy, g.dz, s, at.start, at.tokens, at.channel, at.count) : View{};
  const Target dz = target_tile(w.dz_copy, g.dz, s, at.start, at.channel, at.count);
  for (int64_t t = 0; t < at.tokens; ++t)
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * BLOCK + v * LANES;
      vf r = load(w.gate_slope + i) * (load(w.y + i) + load(p.D + v * LANES) * u.at(t, v));
      if (earlier.data)
        r += earlier.at(t, v);
      dz.put(t, v, r);
    }
  finish(dz, g.dz, s, at.start, at.tokens, at.channel, at.count);
}

// du, and ddelta or what it means for the low-rank step.
void store_du_ddelta(const ScanGradArgs &g, const Work &w, const Slab &s, const BlockParams &p, const BlockSums &sum,
                     View u, const Place &at) {
  const ScanArgs &a = g.in;
  const Target du = target_tile(w.du_copy, g.du, s, at.start, at.channel, at.count);
  const Target ddelta =
      a.rank ? Target{w.ddelta_copy, BLOCK} : target_tile(w.ddelta_copy, g.ddelta, s, at.start, at.channel, at.count);
  for (int v = 0; v < NV; ++v) {
    vf sum_bias = load(sum.bias + v * LANES);
    for (int64_t t = 0; t < at.tokens; ++t) {
      const int64_t i = t * BLOCK + v * LANES;
      const vf through = load(w.dtu_grad + i);
      vf ddt = load(w.dt_grad + i) * LN2 + through * u.at(t, v);
      if (a.softplus)
        ddt *= load(w.slope + i);
      ddelta.put(t, v, ddt);
      sum_bias += ddt;
      du.put(t, v, load(w.dt + i) * through + load(p.D + v * LANES) * load(w.dy + i));
    }
    store(sum.bias + v * LANES, sum_bias);
  }
  finish(du, g.du, s, at.start, at.tokens, at.channel, at.count);
  if (a.rank)
    low_rank_grad(w.low_grad, sum.dt_weight, w.turned, w.ddelta_copy, p, w.shared, a.rank, at.tokens);
  else
    finish(ddelta, g.ddelta, s, at.start, at.tokens, at.channel, at.count);
}

// The chunk's sums over the slab's channels: the low-rank step, B and C side by side for each token.
void store_partial(const Call &call, const Work &w, const Slab &s, int64_t start, int64_t tokens) {
  const ScanArgs &a = call.g.in;
  const int64_t n = a.states;
  float *partial = call.partial + ((s.item * a.groups + s.group) * call.cut.slabs + s.index) * a.len * call.width;
  for (int64_t t = 0; t < tokens; ++t) {
    float *to = partial + s.token(start + t) * call.width;
    for (int64_t r = 0; r < a.rank; ++r)
      to[r] = w.low_grad[r * SCAN_CHUNK + t];
    for (int64_t first = 0; first < n; first += KEPT_STATES) {
      const int64_t group = min_of(n - first, KEPT_STATES);
      const float *from = w.dBC + t * 2 * n + 2 * first;
      memcpy(to + a.rank + first, from, (size_t)group * 4);
      memcpy(to + a.rank + n + first, from + group, (size_t)group * 4);
    }
  }
}

void backward_task(const void *args, int64_t task, int64_t) {
  const Call &call = *(const Call *)args;
  const ScanGradArgs &g = call.g;
  const ScanArgs &a = g.in;
  const Cut &cut = call.cut;
  const Slab s(a, cut, task);
  const int64_t n = a.states, blocks = s.last_block - s.first_block;
  Work w(g, cut, s);
  Ahead ahead;
  ahead.columns = blocks;
  ahead.add(a.u, s), ahead.add(g.dout, s), ahead.add(g.du, s);
  if (!a.rank)
    ahead.add(a.delta, s), ahead.add(g.ddelta, s);
  if (a.z.data)
    ahead.add(a.z, s), ahead.add(g.dz, s);
  for (int64_t chunk = cut.chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * SCAN_CHUNK, tokens = min_of(SCAN_CHUNK, a.len - start);
    const int64_t next = start - SCAN_CHUNK, next_tokens = chunk ? SCAN_CHUNK : 0;
    w.shared.fill(a, s, start, tokens);
    ahead.aim_chunk(s, next, next_tokens, s.channel(cut, s.first_block));
    memset(w.dBC, 0, (size_t)(SCAN_CHUNK * (2 * n + a.rank)) * 4);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t block = s.first_block + k, channel = s.channel(cut, block), count = s.count(cut, block);
      const Place at{start, tokens, channel, count};
      const BlockParams &p = w.params[k];
      const BlockSums &sum = w.sums[k];
      const auto tile_of = [&](float *spare, const Tokens &x) {
        return load_tile(spare, x, s, start, tokens, channel, count);
      };
      const View u = tile_of(w.u_copy, a.u), dout = tile_of(w.dout_copy, g.dout);
      const View delta = a.rank ? View{} : tile_of(w.delta_copy, a.delta);
      const View z = a.z.data ? tile_of(w.z_copy, a.z) : View{};
      if (k + 1 < blocks)
        ahead.aim_tile(s, start, tokens, s.channel(cut, block + 1));
      else
        ahead.aim_tile(s, next, next_tokens, s.channel(cut, s.first_block));
      const bool small = step_tile(w.dt, w.dtu, w.slope, a, p, w.shared, delta, u, tokens);
      grad_before_gate(w, sum.D, (float)a.scale, u, dout, z, tokens);
      const int64_t kept_at = ((s.item * cut.chunks + chunk) * a.groups + s.group) * cut.blocks + block;
      run_states_and_adjoint(a, w, p, sum, a.saved + kept_at * n * BLOCK, small, tokens, &ahead);
      if (z.data)
        store_dz(g, w, s, p, u, at);
      store_du_ddelta(g, w, s, p, sum, u, at);
    }
    store_partial(call, w, s, start, tokens);
  }
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t channel = s.channel(cut, s.first_block + k), count = s.count(cut, s.first_block + k);
    if (g.dinitial_state)
      transpose_out(g.dinitial_state + (s.item * a.dim + channel) * n, w.sums[k].state, count, n);
    // Everything after `state` is a parameter gradient: one column per channel.
    transpose_out(call.items + (s.item * a.dim + channel) * call.per_channel, w.sums[k].A, count, call.per_channel);
  }
}

void sum_slabs(const void *args, int64_t task, int64_t) {
  const Call &call = *(const Call *)args;
  const ScanArgs &a = call.g.in;
  const int64_t item = task / call.cut.chunks, start = task % call.cut.chunks * SCAN_CHUNK;
  const int64_t stop = min_of(start + SCAN_CHUNK, a.len), w = call.width;
  for (int64_t t = start; t < stop; ++t)
    for (int64_t group = 0; group < a.groups; ++group) {
      float *to = call.g.dx + ((item * a.len + t) * a.groups + group) * w;
      const float *from = call.partial + ((item * a.groups + group) * call.cut.slabs * a.len + t) * w;
      for (int64_t i = 0; i < w; ++i) {
        float total = 0.0f;
        for (int64_t slab = 0; slab < call.cut.slabs; ++slab)
          total += from[slab * a.len * w + i];
        to[i] = total;
      }
    }
}

// Adds the batch items' shares of the parameter gradients in order, and deals them out.
void sum_items_of(const Call &call, int64_t channel) {
  const ScanGradArgs &g = call.g;
  const ScanArgs &a = g.in;
  const int64_t n = a.states, rows = call.per_channel;
  float *first = call.items + channel * rows;
  for (int64_t item = 1; item < a.batch; ++item)
    for (int64_t i = 0; i < rows; ++i)
      first[i] += first[item * a.dim * rows + i];
  const float *at = first;
  memcpy(g.dA + channel * n, at, (size_t)n * 4);
  at += n;
  if (a.b_constant)
    memcpy(g.dB_constant + channel * n, at, (size_t)n * 4), at += n;
  if (a.c_constant)
    memcpy(g.dC_constant + channel * n, at, (size_t)n * 4), at += n;
  if (a.rank)
    memcpy(g.ddt_weight + channel * a.rank, at, (size_t)a.rank * 4), at += a.rank;
  if (g.dD)
    g.dD[channel] = at[0];
  if (g.dbias)
    g.dbias[channel] = at[1];
}

void sum_items(const void *args, int64_t block, int64_t) {
  const Call &call = *(const Call *)args;
  for (int64_t c = block * BLOCK; c < min_of((block + 1) * BLOCK, call.g.in.dim); ++c)
    sum_items_of(call, c);
}

void backward(const ScanGradArgs *args) {
  const ScanArgs &a = args->in;
  Call call{*args, Cut(a, false), a.rank + 2 * a.states, nullptr, nullptr, 0};
  call.per_channel = BlockSums::rows(a) - a.states;
  const size_t partial = (size_t)(a.batch * a.groups * call.cut.slabs * a.len * call.width);
  const size_t items = (size_t)(a.batch * a.dim * call.per_channel);
  call.partial = (float *)vim::scratch(1, (partial + items) * 4);
  call.items = call.partial + partial;
  vim::parallel(a.batch * a.groups * call.cut.slabs, a.threads, backward_task, &call);
  vim::parallel(a.batch * call.cut.chunks, a.threads, sum_slabs, &call);
  vim::parallel((a.dim + BLOCK - 1) / BLOCK, a.threads, sum_items, &call);
}

}  // namespace

namespace VIM_ISA {
void (*scan_backward)(const ScanGradArgs *) = backward;
}
