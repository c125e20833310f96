// The operators of an exported model for a program without Python: the mixer and the norm of the namespace "vision_mamba",
// for float32 on CPUs. Compiled with that program against its libtorch, it calls libvim_conv and libvim_mamba, which know
// nothing of torch. scripts/classify_torch.cpp says how to build and link it.
//
// Legend: B batch, L tokens, E inner channels, N states, R rank of dt, W convolution width.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/library.h>

#include "common/dtype.h"
#include "cpu/norm.h"
#include "cpu/scan.h"
#include "conv.h"

extern "C" {
void vim_conv_project(const ConvProjectArgs *);
void vim_scan_forward(const ScanArgs *);
void vim_norm_forward(const NormArgs *);
int64_t vim_conv_project_size();
int64_t vim_scan_forward_size();
int64_t vim_norm_forward_size();
}

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t PARALLEL_FROM = 1 << 15;  // elements; fewer are done before a second thread has woken up
constexpr int64_t MOST_WIDTH = 16;
constexpr size_t PER_DIRECTION = 8;

int64_t threads_for(int64_t elements) { return elements >= PARALLEL_FROM ? at::get_num_threads() : 1; }

// A tensor as the kernels read it, whose shape has been checked: they get bare addresses.
Tensor checked(const char *name, const Optional &t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t && t->defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(t->is_cpu() && t->scalar_type() == at::kFloat && t->sizes() == shape, name, " must be float32 ", shape,
                    " on the CPU, got ", t->scalar_type(), " ", t->sizes(), " on ", t->device());
  return t->contiguous();
}

Tensor checked_if_any(const char *name, const Optional &t, at::IntArrayRef shape) {
  return t && t->defined() ? checked(name, t, shape) : Tensor();
}

const float *address(const Tensor &t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

Tokens tokens(const float *data, int64_t len, int64_t stride) {
  return {(char *)data, vim::kFloat32, len * stride, stride};
}

Tensor mixer(const Tensor &given, const c10::List<Optional> &tensors, const c10::List<bool> &reverses, double scale) {
  TORCH_CHECK_VALUE(given.dim() == 3 && given.size(2) >= 2 && given.size(2) % 2 == 0 && !reverses.empty() &&
                        tensors.size() == PER_DIRECTION * reverses.size(),
                    "a mixer takes xz (batch, tokens, 2 * channels) and eight tensors per direction, got ", given.sizes(),
                    " and ", tensors.size(), " tensors for ", reverses.size(), " directions");
  const int64_t batch = given.size(0), len = given.size(1), dim = given.size(2) / 2;
  const Tensor xz = checked("xz", given, given.sizes());
  const Tensor out = at::empty({batch, len, dim}, xz.options()), u = at::empty(out.sizes(), xz.options());
  bool written = false;
  for (size_t d = 0; d < reverses.size() && out.numel() > 0; ++d) {
    const auto field = [&](size_t i) -> Optional { return tensors.get(d * PER_DIRECTION + i); };
    const auto columns = [&](size_t i, const char *name) {
      const Optional t = field(i);
      TORCH_CHECK_VALUE(t && t->dim() == 2 && t->size(1) > 0, name, " must be a matrix with columns");
      return t->size(1);
    };
    const int64_t width = columns(0, "conv_weight"), rank = columns(3, "dt_proj_weight"), states = columns(5, "A");
    const int64_t wide = rank + 2 * states;
    TORCH_CHECK_VALUE(width <= MOST_WIDTH, "the native convolution takes widths up to ", MOST_WIDTH, ", got ", width);
    const Tensor conv_weight = checked("conv_weight", field(0), {dim, width});
    const Tensor conv_bias = checked_if_any("conv_bias", field(1), {dim});
    const Tensor x_proj_weight = checked("x_proj_weight", field(2), {wide, dim});
    const Tensor dt_proj_weight = checked("dt_proj_weight", field(3), {dim, rank});
    const Tensor dt_bias = checked("dt_bias", field(4), {dim}), A = checked("A", field(5), {dim, states});
    const Tensor D = checked("D", field(6), {dim}), A_back = checked_if_any("A_back", field(7), {dim, states});
    const Tensor projected = at::empty({batch, len, wide}, xz.options());
    const Tensor last_state = at::empty({batch, dim, states}, xz.options());

    ConvProjectArgs g{};
    g.conv.batch = batch, g.conv.len = len, g.conv.dim = dim, g.conv.width = width;
    g.conv.silu = 1, g.conv.reverse = reverses.get(d), g.conv.threads = threads_for(u.numel());
    g.conv.x = tokens(address(xz), len, 2 * dim), g.conv.out = tokens(address(u), len, dim);
    g.conv.weight = address(conv_weight), g.conv.bias = address(conv_bias);
    g.project_weight = address(x_proj_weight), g.outputs = wide, g.projected = projected.mutable_data_ptr<float>();
    vim_conv_project(&g);

    ScanArgs a{};
    a.batch = batch, a.len = len, a.dim = dim, a.states = states, a.groups = 1, a.rank = rank;
    a.softplus = 1, a.scale = scale, a.threads = threads_for(u.numel() * states);
    a.u = tokens(address(u), len, dim), a.z = tokens(address(xz) + dim, len, 2 * dim);
    a.delta = tokens(address(projected), len, wide), a.B = tokens(address(projected) + rank, len, wide);
    a.C = tokens(address(projected) + rank + states, len, wide), a.out = tokens(address(out), len, dim);
    a.D = address(D), a.bias = address(dt_bias), a.dt_weight = address(dt_proj_weight);
    a.last_state = last_state.mutable_data_ptr<float>();
    for (const Tensor &each : {A, A_back}) {
      if (!each.defined())
        continue;
      a.A = address(each), a.reverse = reverses.get(d) != (each.is_same(A_back)), a.accumulate = written;
      vim_scan_forward(&a);
      written = true;
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(const Tensor &given, const Optional &residual, const Tensor &weight,
                                                    const Optional &bias, double eps, bool rms, at::ScalarType kept) {
  TORCH_CHECK_VALUE(given.dim() > 0 && given.size(-1) > 0 && kept == at::kFloat,
                    "x must have at least one channel, and the residual stream float32; got ", given.sizes(), " and ", kept);
  const int64_t dim = given.size(-1);
  const auto rows = given.sizes().slice(0, given.dim() - 1);
  const Tensor x = checked("x", given, given.sizes()), stream = checked_if_any("residual", residual, given.sizes());
  const Tensor scale = checked("weight", weight, {dim}), shift = checked_if_any("bias", bias, {dim});
  const Tensor y = at::empty(given.sizes(), x.options()), sum = at::empty(given.sizes(), x.options());
  const Tensor mean = rms ? at::empty({0}, x.options()) : at::empty(rows, x.options());
  const Tensor rstd = at::empty(rows, x.options());
  NormArgs a{};  // every data type is 0, float32
  a.rows = x.numel() / dim, a.dim = dim, a.rms = rms, a.threads = threads_for(x.numel()), a.eps = eps;
  a.x = (const char *)address(x), a.residual = (const char *)address(stream);
  a.y = (char *)y.mutable_data_ptr(), a.residual_out = (char *)sum.mutable_data_ptr();
  a.weight = address(scale), a.bias = address(shift);
  a.mean = rms ? nullptr : mean.mutable_data_ptr<float>(), a.rstd = rstd.mutable_data_ptr<float>();
  if (a.rows > 0)
    vim_norm_forward(&a);
  return {y, sum, mean, rstd};
}

// The kernels run on the threads of torch's OpenMP, which this process has loaded, and start none of their own.
void share_threads() {
  void *parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  for (const char *name : {"libvim_conv.so", "libvim_mamba.so"}) {
    void *library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);  // both have the function
    void *use = library ? dlsym(library, "vim_use_openmp") : nullptr;
    if (parallel && use)
      ((void (*)(void *))use)(parallel);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_mamba, m) {
  TORCH_CHECK(vim_conv_project_size() == sizeof(ConvProjectArgs) && vim_scan_forward_size() == sizeof(ScanArgs) &&
                  vim_norm_forward_size() == sizeof(NormArgs),
              "libvim_conv or libvim_mamba was compiled from other sources than this program: build both again");
  share_threads();
  // The schemas are those that Python registers: a package names the operators and lists their arguments.
  m.def("mixer(Tensor xz, Tensor?[] tensors, bool[] reverses, float scale) -> Tensor");
  m.def(
      "add_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool rms, ScalarType residual_dtype) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.impl("mixer", c10::DispatchKey::CPU, mixer);
  m.impl("add_norm", c10::DispatchKey::CPU, add_norm);
}
