// What is used of ONNX Runtime's C interface, stated here because its Python package brings no headers. The interface is a
// table of functions to which releases only append, and a struct that a custom operator fills in.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ort {

constexpr uint32_t API_VERSION = 18;  // ONNX Runtime 1.18, the first that has every function below

// Positions in the table.
enum Function {
  CREATE_STATUS = 0,
  GET_ERROR_MESSAGE = 2,
  CREATE_ENV = 3,
  CREATE_SESSION = 7,
  RUN = 9,
  CREATE_SESSION_OPTIONS = 10,
  SET_INTRA_OP_THREADS = 24,
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  ADD_DOMAIN = 28,
  REGISTER_LIBRARY = 29,
  TENSOR_FROM_DATA = 49,
  TENSOR_DATA = 51,
  DIMENSION_COUNT = 61,
  DIMENSIONS = 62,
  ELEMENT_COUNT = 64,
  TYPE_AND_SHAPE = 65,
  CPU_MEMORY_INFO = 69,
  ATTRIBUTE_FLOAT = 85,
  ATTRIBUTE_INT = 86,
  INPUT_COUNT = 88,
  INPUT = 90,
  OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_SHAPE = 99,
  PARALLEL_FOR = 274,
};

typedef void *Status;  // null: success
typedef void *const *Api;

struct ApiBase {
  Api (*get_api)(uint32_t version);
  const char *(*version)();
};

template <typename Result = Status, typename... Arguments>
Result call(Api api, Function which, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(api[which])(arguments...);
}

enum { FLOAT = 1 };                  // element type
enum { REQUIRED = 0, OPTIONAL = 1 };  // inputs and outputs

struct Operator {
  uint32_t version;
  void *(*create)(const Operator *, Api, const void *info);
  const char *(*name)(const Operator *);
  const char *(*provider)(const Operator *);
  int (*input_type)(const Operator *, size_t);
  size_t (*input_count)(const Operator *);
  int (*output_type)(const Operator *, size_t);
  size_t (*output_count)(const Operator *);
  void (*compute)(void *kernel, void *context);
  void (*destroy)(void *kernel);
  int (*input_kind)(const Operator *, size_t);
  int (*output_kind)(const Operator *, size_t);
  int (*input_memory)(const Operator *, size_t);
  int (*variadic[4])(const Operator *);
  Status (*create_or_fail)(const Operator *, Api, const void *info, void **kernel);
  Status (*compute_or_fail)(void *kernel, void *context);
  Status (*infer_shapes)(const Operator *, void *context);
  int (*versions[2])(const Operator *);
  void *later[4];
};

}  // namespace ort
