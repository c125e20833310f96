// The CPU kernels as an operator of ONNX Runtime, in the domain "vision_mamba", for float32: the mixer between in_proj and
// out_proj. It runs on the session's threads.
//
// Legend: B batch, L tokens, E inner channels, N states, R rank of dt, W convolution width.

#include <stdio.h>

#include <thread>
#include <vector>

#include "abi.h"
#include "common/dtype.h"
#include "common/runtime.h"
#include "common/select.h"
#include "cpu/scan.h"
#include "conv.h"

VIM_DECLARE(conv_project, ConvProjectArgs)
VIM_DECLARE(scan_forward, ScanArgs)

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 15;  // elements; fewer are done before a second thread has woken up
constexpr size_t PER_DIRECTION = 8, MOST_INPUTS = 1 + 2 * PER_DIRECTION;

struct Tensor {
  float *data = nullptr;  // null: an optional input that is absent
  int64_t rank = 0, size[8] = {};

  bool is(int64_t first) const { return rank == 1 && size[0] == first; }
  bool is(int64_t first, int64_t second) const { return rank == 2 && size[0] == first && size[1] == second; }
};

// One call of an operator: its inputs and outputs, and the first error met.
struct Context {
  ort::Api api;
  void *context;
  ort::Status status = nullptr;

  void fail(const char *sentence) {
    if (!status)
      status = ort::call(api, ort::CREATE_STATUS, 2, sentence);  // 2: an invalid argument
  }
  bool done(ort::Status result) {
    if (!status)
      status = result;
    return !status;
  }
  Tensor tensor(void *value) {
    Tensor found;
    void *shape = nullptr;
    size_t rank = 0;
    if (!value || !done(ort::call(api, ort::TYPE_AND_SHAPE, (const void *)value, &shape)))
      return found;
    if (done(ort::call(api, ort::DIMENSION_COUNT, (const void *)shape, &rank))) {
      found.rank = (int64_t)rank;
      if (rank > 8)
        fail("a tensor has more than eight dimensions");
      else if (done(ort::call(api, ort::DIMENSIONS, (const void *)shape, found.size, rank)))
        done(ort::call(api, ort::TENSOR_DATA, value, (void **)&found.data));
    }
    ort::call<void>(api, ort::RELEASE_SHAPE, shape);
    return found;
  }
  Tensor input(size_t index) {
    size_t count = 0;
    void *value = nullptr;
    done(ort::call(api, ort::INPUT_COUNT, (const void *)context, &count));
    if (index < count)
      done(ort::call(api, ort::INPUT, (const void *)context, index, &value));
    return tensor(value);
  }
  float *output(size_t index, const int64_t *size, int64_t rank) {
    void *value = nullptr;
    done(ort::call(api, ort::OUTPUT, context, index, size, (size_t)rank, &value));
    return tensor(value).data;
  }
};

// Runs loops of the kernels on the session's threads while it lives.
struct OnSession {
  explicit OnSession(Context &c) { vim::use_runner(run, &c); }
  ~OnSession() { vim::use_runner(nullptr, nullptr); }

  struct Loop {
    void (*body)(void *);
    void *data;
  };
  static void once(void *loop, size_t) { ((Loop *)loop)->body(((Loop *)loop)->data); }
  static void run(void *context, void (*body)(void *), void *data, int64_t threads) {
    Context &c = *(Context *)context;
    Loop loop{body, data};
    c.done(ort::call(c.api, ort::PARALLEL_FOR, (const void *)c.context, once, (size_t)threads, (size_t)threads,
                     (void *)&loop));
  }
};

int64_t threads_for(int64_t elements) {
  static const int64_t all = std::thread::hardware_concurrency() ? std::thread::hardware_concurrency() : 1;
  return elements >= PARALLEL_FROM ? all : 1;
}

Tokens tokens(const float *data, int64_t len, int64_t stride) {
  return {(char *)data, vim::kFloat32, len * stride, stride};
}

float *buffer(int which, int64_t count) {
  thread_local std::vector<float> buffers[3];
  if ((int64_t)buffers[which].size() < count)
    buffers[which].resize((size_t)count);
  return buffers[which].data();
}

struct Direction {
  Tensor conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, A_back;

  bool read(Context &c, size_t first, int64_t dim) {
    Tensor *all[PER_DIRECTION] = {&conv_weight, &conv_bias, &x_proj_weight, &dt_proj_weight, &dt_bias, &A, &D, &A_back};
    for (size_t i = 0; i < PER_DIRECTION; ++i)
      *all[i] = c.input(first + i);
    const int64_t rank = dt_proj_weight.size[1], states = A.size[1];
    const bool fits = conv_weight.is(dim, conv_weight.size[1]) && x_proj_weight.is(rank + 2 * states, dim) &&
                      dt_proj_weight.is(dim, rank) && dt_bias.is(dim) && A.is(dim, states) && D.is(dim) && rank > 0 &&
                      states > 0 && (!conv_bias.data || conv_bias.is(dim)) && (!A_back.data || A_back.is(dim, states));
    if (!fits || conv_weight.size[1] < 1 || conv_weight.size[1] > 16)
      c.fail("Mixer: the shapes of a direction's weights do not fit xz, or the convolution is wider than 16");
    return !c.status;
  }
};

struct Mixer {
  ort::Api api;
  int64_t reverse = 0;  // bit d: direction d runs from the last token to the first
  float scale = 1.0f;

  Mixer(Context &c, const void *info) : api(c.api) {
    c.done(ort::call(c.api, ort::ATTRIBUTE_INT, info, "reverse", &reverse));
    c.done(ort::call(c.api, ort::ATTRIBUTE_FLOAT, info, "scale", &scale));
  }

  void scan(const Direction &p, const Tensor &A, bool backwards, const float *u, const float *projected, const float *z,
            float *out, bool accumulate, int64_t batch, int64_t len, int64_t dim) const {
    const int64_t rank = p.dt_proj_weight.size[1], states = A.size[1], wide = rank + 2 * states;
    ScanArgs a{};
    a.batch = batch, a.len = len, a.dim = dim, a.states = states, a.groups = 1, a.rank = rank;
    a.softplus = 1, a.reverse = backwards, a.accumulate = accumulate, a.scale = scale;
    a.threads = threads_for(batch * len * dim * states);
    a.u = tokens(u, len, dim), a.delta = tokens(projected, len, wide), a.z = tokens(z, len, 2 * dim);
    a.B = tokens(projected + rank, len, wide), a.C = tokens(projected + rank + states, len, wide);
    a.out = tokens(out, len, dim);
    a.A = A.data, a.D = p.D.data, a.bias = p.dt_bias.data, a.dt_weight = p.dt_proj_weight.data;
    a.last_state = buffer(2, batch * dim * states);
    VIM_BEST(scan_forward)(&a);
  }

  void compute(Context &c) const {
    const Tensor xz = c.input(0);
    if (xz.rank != 3 || xz.size[2] % 2)
      return c.fail("Mixer: xz must be (batch, tokens, 2 * channels)");
    const int64_t batch = xz.size[0], len = xz.size[1], dim = xz.size[2] / 2, size[] = {batch, len, dim};
    float *out = c.output(0, size, 3);
    if (c.status || batch * len * dim == 0)
      return;
    bool written = false;
    for (size_t d = 0; d < 2; ++d) {
      const size_t first = 1 + d * PER_DIRECTION;
      if (d > 0 && !c.input(first).data)
        break;
      Direction p;
      if (!p.read(c, first, dim))
        return;
      const bool backwards = reverse >> d & 1;
      ConvProjectArgs g{};
      g.conv.batch = batch, g.conv.len = len, g.conv.dim = dim, g.conv.width = p.conv_weight.size[1];
      g.conv.silu = 1, g.conv.reverse = backwards, g.conv.threads = threads_for(batch * len * dim);
      g.conv.x = tokens(xz.data, len, 2 * dim);
      float *u = buffer(0, batch * len * dim);
      g.conv.out = tokens(u, len, dim);
      g.conv.weight = p.conv_weight.data, g.conv.bias = p.conv_bias.data;
      g.project_weight = p.x_proj_weight.data, g.outputs = p.x_proj_weight.size[0];
      g.projected = buffer(1, batch * len * g.outputs);
      VIM_BEST(conv_project)(&g);
      for (const Tensor *A : {&p.A, &p.A_back}) {
        if (!A->data)
          continue;
        scan(p, *A, backwards != (A == &p.A_back), u, g.projected, xz.data + dim, out, written, batch, len, dim);
        written = true;
      }
    }
  }
};

ort::Status create(const ort::Operator *, ort::Api api, const void *info, void **made) {
  Context c{api, nullptr};
  Mixer *mixer = new Mixer(c, info);
  if (c.status)
    delete mixer;
  else
    *made = mixer;
  return c.status;
}

ort::Status compute(void *made, void *context) {
  const Mixer &mixer = *(const Mixer *)made;
  Context c{mixer.api, context};
  const OnSession threads(c);
  mixer.compute(c);
  return c.status;
}

ort::Operator describe() {
  ort::Operator o{};
  o.version = 16;
  o.name = [](const ort::Operator *) { return "Mixer"; };
  o.provider = [](const ort::Operator *) -> const char * { return nullptr; };
  o.input_type = o.output_type = [](const ort::Operator *, size_t) -> int { return ort::FLOAT; };
  o.input_count = [](const ort::Operator *) { return MOST_INPUTS; };
  o.output_count = [](const ort::Operator *) -> size_t { return 1; };
  o.input_kind = [](const ort::Operator *, size_t i) -> int { return i == 0 ? ort::REQUIRED : ort::OPTIONAL; };
  o.output_kind = [](const ort::Operator *, size_t) -> int { return ort::REQUIRED; };
  o.input_memory = [](const ort::Operator *, size_t) { return 0; };
  for (auto &each : o.variadic)
    each = [](const ort::Operator *) { return 1; };
  o.create_or_fail = create;
  o.compute_or_fail = compute;
  o.destroy = [](void *made) { delete (Mixer *)made; };
  return o;
}

}  // namespace

// What ONNX Runtime calls when the library is registered with the options of a session.
extern "C" __attribute__((visibility("default"))) ort::Status RegisterCustomOps(void *options, const ort::ApiBase *base) {
  static const ort::Operator mixer = describe();
  const ort::Api api = base->get_api(ort::API_VERSION);
  if (!api) {
    fprintf(stderr, "the operator of vision_mamba needs ONNX Runtime 1.%u or newer, this is %s\n", ort::API_VERSION,
            base->version());
    const ort::Api first = base->get_api(1);
    return ort::call(first, ort::CREATE_STATUS, 1, (const char *)"vision_mamba: ONNX Runtime is too old");
  }
  void *domain = nullptr;  // sessions may outlive whoever registered it, so it is never released
  ort::Status status = ort::call(api, ort::CREATE_DOMAIN, "vision_mamba", &domain);
  if (!status)
    status = ort::call(api, ort::DOMAIN_ADD, domain, &mixer);
  return status ? status : ort::call(api, ort::ADD_DOMAIN, options, domain);
}
