// Backward pass of the selective scan. Chunks run from the last to the first in scan order; the states inside a chunk
// are made again from the state kept before it. Sums over channels (for B, C and the low-rank step) are kept per lane over
// the blocks of a slab, folded once per chunk, and added over slabs in a fixed order afterwards.

#include "scan_tile.h"

namespace {

struct Call {
  const ScanGradArgs &g;
  Cut cut;
  int64_t width;  // rank + 2 * states
  float *partial;  // (B, G, slabs, L, width)
  float *items;    // (B, E, per_channel): this batch item's share of the parameter gradients
  int64_t per_channel;
};

// Running sums of one block over all chunks: (rows, BLOCK) each.
struct BlockSums {
  float *state, *A, *B, *C, *dt_weight, *D, *bias;
  static int64_t rows(const ScanArgs &a) {
    return a.states * (2 + a.b_constant + a.c_constant) + a.rank + 2;
  }
  void place(float *memory, const ScanArgs &a) {
    state = memory;
    A = state + a.states * BLOCK;
    B = A + a.states * BLOCK;
    C = B + a.b_constant * a.states * BLOCK;
    dt_weight = C + a.c_constant * a.states * BLOCK;
    D = dt_weight + a.rank * BLOCK;
    bias = D + BLOCK;
  }
};

// The adjoint recurrence over one tile. Per state: g = dL/dh_t, of which decay * g goes on to h_{t-1}.
// dtu_grad receives dL/d(dt u), dt_grad the part of dL/d(dt) that comes through the decay, divided by log 2.
template <bool B_CONSTANT, bool C_CONSTANT, int STATES>
void adjoint_tile(int64_t tokens, int64_t states, const float *dt, const float *dtu, const float *dy, const float *B,
                  const float *C, const float *A2, const float *before, const float *kept_h, const float *kept_decay,
                  const BlockSums &sums, float *lanes_B, float *lanes_C, float *dtu_grad, float *dt_grad) {
  const int64_t n = STATES ? STATES : states;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float *h = kept_h + t * n * BLOCK, *decay = kept_decay + t * n * BLOCK;
    const float *previous = t ? h - n * BLOCK : before;
    vf step[NV], input[NV], dout[NV], to_input[NV], to_step[NV];
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * BLOCK + v * LANES;
      step[v] = load(dt + at);
      input[v] = load(dtu + at);
      dout[v] = load(dy + at);
      to_input[v] = to_step[v] = vf{};
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) {
      vf sum_B = vf{}, sum_C = vf{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = j * BLOCK + v * LANES;
        const vf b = B_CONSTANT ? load(B + at) : broadcast(B[t * n + j]);
        const vf c = C_CONSTANT ? load(C + at) : broadcast(C[t * n + j]);
        const vf g = load(sums.state + at) + c * dout[v];
        const vf through = g * load(decay + at);
        store(sums.state + at, through);
        const vf exponent = through * load(previous + at);
        to_input[v] += g * b;
        to_step[v] += exponent * load(A2 + at);
        store(sums.A + at, load(sums.A + at) + exponent * step[v]);
        if (B_CONSTANT)
          store(sums.B + at, load(sums.B + at) + g * input[v]);
        else
          sum_B += g * input[v];
        if (C_CONSTANT)
          store(sums.C + at, load(sums.C + at) + dout[v] * load(h + at));
        else
          sum_C += dout[v] * load(h + at);
      }
      if (!B_CONSTANT) {
        float *to = lanes_B + (t * n + j) * LANES;
        store(to, load(to) + sum_B);
      }
      if (!C_CONSTANT) {
        float *to = lanes_C + (t * n + j) * LANES;
        store(to, load(to) + sum_C);
      }
    }
    for (int v = 0; v < NV; ++v) {
      store(dtu_grad + t * BLOCK + v * LANES, to_input[v]);
      store(dt_grad + t * BLOCK + v * LANES, to_step[v]);
    }
  }
}

void adjoint_tile_for(const ScanArgs &a, const BlockParams &p, const Shared &shared, int64_t tokens, const float *dt,
                      const float *dtu, const float *dy, const float *before, const float *kept_h,
                      const float *kept_decay, const BlockSums &sums, float *lanes_B, float *lanes_C, float *dtu_grad,
                      float *dt_grad) {
  const float *B = a.b_constant ? p.B : shared.B, *C = a.c_constant ? p.C : shared.C;
#define VIM_RUN(b, c, n)                                                                                      \
  adjoint_tile<b, c, n>(tokens, a.states, dt, dtu, dy, B, C, p.A2, before, kept_h, kept_decay, sums, lanes_B, \
                             lanes_C, dtu_grad, dt_grad)
  if (a.b_constant)
    a.c_constant ? VIM_RUN(true, true, 0) : VIM_RUN(true, false, 0);
  else if (a.c_constant)
    VIM_RUN(false, true, 0);
  else if (a.states == 16)
    VIM_RUN(false, false, 16);
  else
    VIM_RUN(false, false, 0);
#undef VIM_RUN
}

void backward_task(const void *args, int64_t task, int64_t) {
  const Call &call = *(const Call *)args;
  const ScanGradArgs &g = call.g;
  const ScanArgs &a = g.in;
  const Cut &cut = call.cut;
  const Slab s(a, cut, task);
  const int64_t n = a.states, blocks = s.last_block - s.first_block;
  const int64_t params_floats = BlockParams::floats(a), sums_floats = BlockSums::rows(a) * BLOCK;
  const int64_t kept = SCAN_CHUNK * n * BLOCK, lanes = SCAN_CHUNK * LANES * call.width;

  const size_t bytes = (size_t)(blocks * (params_floats + sums_floats) + n * BLOCK + 2 * kept + lanes + 11 * TILE +
                                Shared::floats(a)) * 4 + (size_t)blocks * (sizeof(BlockParams) + sizeof(BlockSums));
  float *kept_h = (float *)vim::scratch(0, bytes);
  float *kept_decay = kept_h + kept, *lanes_dt = kept_decay + kept, *lanes_B = lanes_dt + SCAN_CHUNK * a.rank * LANES,
        *lanes_C = lanes_B + SCAN_CHUNK * n * LANES, *h = lanes_dt + lanes, *dt = h + n * BLOCK;
  float *u = dt + TILE, *dtu = u + TILE, *z = dtu + TILE, *dout = z + TILE, *y = dout + TILE, *slope = y + TILE,
        *dtu_grad = slope + TILE, *dt_grad = dtu_grad + TILE, *earlier_dz = dt_grad + TILE, *spare = earlier_dz + TILE;
  Shared shared(spare + TILE, a);
  float *params_memory = spare + TILE + Shared::floats(a), *sums_memory = params_memory + blocks * params_floats;
  BlockParams *params = (BlockParams *)(sums_memory + blocks * sums_floats);
  BlockSums *sums = (BlockSums *)(params + blocks);

  memset(sums_memory, 0, (size_t)(blocks * sums_floats) * 4);
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t channel = s.channel(cut, s.first_block + k), count = s.count(cut, s.first_block + k);
    params[k].fill(params_memory + k * params_floats, a, channel, count);
    sums[k].place(sums_memory + k * sums_floats, a);
    if (g.dlast_state)
      transpose_in(sums[k].state, g.dlast_state + (s.item * a.dim + channel) * n, count, n, 1.0f);
  }
  const float scale = (float)a.scale;
  for (int64_t chunk = cut.chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * SCAN_CHUNK, tokens = min_of(SCAN_CHUNK, a.len - start);
    shared.fill(a, s, start, tokens);
    memset(lanes_dt, 0, (size_t)lanes * 4);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t block = s.first_block + k, channel = s.channel(cut, block), count = s.count(cut, block);
      const BlockParams &p = params[k];
      const BlockSums &sum = sums[k];
      const int64_t at_saved = ((s.item * cut.chunks + chunk) * a.groups + s.group) * cut.blocks + block;
      const float *before = a.saved + at_saved * n * BLOCK;
      load_tile(u, a.u, s, start, tokens, channel, count);
      load_tile(dout, g.dout, s, start, tokens, channel, count);
      if (!a.rank)
        load_tile(dt, a.delta, s, start, tokens, channel, count);
      const bool small = step_tile(dt, slope, a, p, shared, tokens);
      for (int64_t i = 0; i < tokens * BLOCK; i += LANES)
        store(dtu + i, load(dt + i) * load(u + i));
      memcpy(h, before, (size_t)(n * BLOCK) * 4);
      if (small)
        run_tile_for<true, true>(a, p, shared, tokens, dt, dtu, h, y, kept_h, kept_decay);
      else
        run_tile_for<false, true>(a, p, shared, tokens, dt, dtu, h, y, kept_h, kept_decay);

      if (a.z.data) {
        load_tile(z, a.z, s, start, tokens, channel, count);
        if (g.accumulate_dz)
          load_tile(earlier_dz, g.dz, s, start, tokens, channel, count);
      }
      for (int64_t t = 0; t < tokens; ++t)
        for (int v = 0; v < NV; ++v) {
          const int64_t i = t * BLOCK + v * LANES;
          vf dy = load(dout + i) * scale;
          if (a.z.data) {
            const vf gate = load(z + i), sig = sigmoid(gate);
            const vf total = load(y + i) + load(p.D + v * LANES) * load(u + i);
            vf dz = dy * total * sig * (1.0f + gate * (1.0f - sig));
            if (g.accumulate_dz)
              dz += load(earlier_dz + i);
            store(z + i, dz);
            dy *= gate * sig;
          }
          store(dout + i, dy);
          store(sum.D + v * LANES, load(sum.D + v * LANES) + dy * load(u + i));
        }
      if (a.z.data)
        store_tile(z, g.dz, s, start, tokens, channel, count);

      adjoint_tile_for(a, p, shared, tokens, dt, dtu, dout, before, kept_h, kept_decay, sum, lanes_B, lanes_C,
                       dtu_grad, dt_grad);

      for (int64_t t = 0; t < tokens; ++t)
        for (int v = 0; v < NV; ++v) {
          const int64_t i = t * BLOCK + v * LANES;
          const vf through = load(dtu_grad + i), x = load(u + i);
          vf ddt = load(dt_grad + i) * LN2 + through * x;
          if (a.softplus)
            ddt *= load(slope + i);
          store(dtu_grad + i, load(dt + i) * through + load(p.D + v * LANES) * load(dout + i));
          store(dt_grad + i, ddt);
          store(sum.bias + v * LANES, load(sum.bias + v * LANES) + ddt);
        }
      store_tile(dtu_grad, g.du, s, start, tokens, channel, count);
      if (!a.rank) {
        store_tile(dt_grad, g.ddelta, s, start, tokens, channel, count);
        continue;
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const float *low = shared.low_rank + t * a.rank;
        for (int64_t r = 0; r < a.rank; ++r) {
          vf to_low = load(lanes_dt + (t * a.rank + r) * LANES);
          for (int v = 0; v < NV; ++v) {
            const vf ddt = load(dt_grad + t * BLOCK + v * LANES);
            float *weight = sum.dt_weight + r * BLOCK + v * LANES;
            store(weight, load(weight) + ddt * low[r]);
            to_low += ddt * load(p.dt_weight + r * BLOCK + v * LANES);
          }
          store(lanes_dt + (t * a.rank + r) * LANES, to_low);
        }
      }
    }
    float *partial = call.partial + ((s.item * a.groups + s.group) * cut.slabs + s.index) * a.len * call.width;
    for (int64_t t = 0; t < tokens; ++t) {
      float *to = partial + s.token(start + t) * call.width;
      sum_lanes_of(to, lanes_dt + t * a.rank * LANES, a.rank);
      sum_lanes_of(to + a.rank, lanes_B + t * n * LANES, n);
      sum_lanes_of(to + a.rank + n, lanes_C + t * n * LANES, n);
    }
  }
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t channel = s.channel(cut, s.first_block + k), count = s.count(cut, s.first_block + k);
    if (g.dinitial_state)
      transpose_out(g.dinitial_state + (s.item * a.dim + channel) * n, sums[k].state, count, n);
    // Everything after `state` is a parameter gradient: one column per channel.
    transpose_out(call.items + (s.item * a.dim + channel) * call.per_channel, sums[k].A, count, call.per_channel);
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
void sum_items(const void *args, int64_t channel, int64_t) {
  const Call &call = *(const Call *)args;
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
  vim::parallel(a.dim, 1, sum_items, &call);
}

}  // namespace

namespace VIM_ISA {
void (*scan_backward)(const ScanGradArgs *) = backward;
}
