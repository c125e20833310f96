// Elements of the CUDA kernels' tensors: float, bfloat16 and float16, converted to and from float.
#pragma once

#include "common/dtype.h"
#include "common/launch.h"

namespace vim {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

VIM_HD float to_float(float value) { return value; }

VIM_HD float to_float(BFloat16 value) {
  union {
    uint32_t bits;
    float number;
  } cast;
  cast.bits = static_cast<uint32_t>(value.bits) << 16;
  return cast.number;
}

VIM_HD float to_float(Float16 value) {
#ifdef __CUDACC__
  return __half2float(__half(__half_raw{value.bits}));
#else
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
#endif
}

template <typename T> VIM_HD T from_float(float value);

template <> VIM_HD float from_float<float>(float value) { return value; }

template <> VIM_HD BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDACC__
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return BFloat16{0x7fff};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <> VIM_HD Float16 from_float<Float16>(float value) {
#ifdef __CUDACC__
  return Float16{__half_as_ushort(__float2half_rn(value))};
#else
  _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return Float16{bits};
#endif
}

// COUNT neighbouring elements as one load or store.
template <typename T, int COUNT> struct alignas(sizeof(T) * COUNT) Pack {
  T values[COUNT];
};

// An element of a tensor whose type is known only at run time (tiles of B and C: few loads, so no template for them).
VIM_HD float load_any(const void *data, int64_t index, int32_t type) {
  if (type == kFloat32)
    return static_cast<const float *>(data)[index];
  if (type == kBFloat16)
    return to_float(static_cast<const BFloat16 *>(data)[index]);
  return to_float(static_cast<const Float16 *>(data)[index]);
}

VIM_HD void store_any(void *data, int64_t index, int32_t type, float value) {
  if (type == kFloat32)
    static_cast<float *>(data)[index] = value;
  else if (type == kBFloat16)
    static_cast<BFloat16 *>(data)[index] = from_float<BFloat16>(value);
  else
    static_cast<Float16 *>(data)[index] = from_float<Float16>(value);
}

VIM_HD constexpr int64_t ceil_div(int64_t count, int64_t step) { return (count + step - 1) / step; }

// Calls `run` with an element of the type that the code names; kUnsupported for any other code.
template <typename Run> int with_element_type(int32_t type, const Run &run) {
  if (type == kFloat32)
    return run(float{});
  if (type == kBFloat16)
    return run(BFloat16{});
  if (type == kFloat16)
    return run(Float16{});
  return kUnsupported;
}

// Whether every row of a tensor, if there is one, starts on a multiple of `bytes`. Strides are in elements.
inline bool rows_aligned(const void *data, int64_t batch_stride, int64_t token_stride, int64_t element_size,
                         int64_t bytes) {
  return data == nullptr || (reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
                             batch_stride * element_size % bytes == 0 && token_stride * element_size % bytes == 0);
}

}  // namespace vim
