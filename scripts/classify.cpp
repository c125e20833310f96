// Classify a picture with ONNX Runtime and the native kernels, without Python.
//
//   g++ -O2 -std=c++17 -I mamba-1p1p1/csrc/onnxruntime scripts/classify.cpp -o classify -ldl
//   python scripts/export_onnx.py vim_tiny_patch16_224 --checkpoint vim_t.pth --native --output vim_t.onnx
//   convert cat.jpg -resize '256x256^' -gravity center -extent 224x224 cat.ppm
//   ./classify libonnxruntime.so vim_t.onnx cat.ppm libvim_onnxruntime.so
//
// The picture is a binary PPM of the model's size. The last argument is left out for a file of standard operators.
// Prints the five likeliest classes, one a line: index, probability. Environment: VIM_THREADS (default 1), VIM_REPEAT: that
// many runs more, whose median time in ms is printed.
#include <dlfcn.h>

#include <chrono>

#include "abi.h"
#include "picture.h"

namespace {

struct Runtime {
  ort::Api api;

  explicit Runtime(const char *library) {
    void *handle = dlopen(library, RTLD_NOW);
    void *entry = handle ? dlsym(handle, "OrtGetApiBase") : nullptr;
    if (!entry)
      throw std::runtime_error(std::string("ONNX Runtime does not load: ") + dlerror());
    api = ((const ort::ApiBase *(*)())entry)()->get_api(ort::API_VERSION);
    if (!api)
      throw std::runtime_error(std::string(library) + " is too old");
  }
  template <typename... Arguments>
  void operator()(ort::Function which, Arguments... arguments) const {
    if (ort::Status status = ort::call(api, which, arguments...))
      throw std::runtime_error(ort::call<const char *>(api, ort::GET_ERROR_MESSAGE, status));
  }
};

void classify(const char *library, const char *model, const char *file, const char *operators) {
  Picture picture = read_picture(file);
  const Runtime run(library);
  void *env = nullptr, *options = nullptr, *session = nullptr, *memory = nullptr, *input = nullptr, *handle = nullptr;
  run(ort::CREATE_ENV, 3, "classify", &env);  // 3: errors only
  run(ort::CREATE_SESSION_OPTIONS, &options);
  run(ort::SET_INTRA_OP_THREADS, options, number("VIM_THREADS", 1));
  if (operators)
    run(ort::REGISTER_LIBRARY, options, operators, &handle);
  run(ort::CREATE_SESSION, env, model, options, &session);
  const int64_t shape[] = {1, 3, picture.height, picture.width};
  run(ort::CPU_MEMORY_INFO, 0, 0, &memory);
  run(ort::TENSOR_FROM_DATA, memory, (void *)picture.values.data(), picture.values.size() * sizeof(float), &shape[0],
      (size_t)4, (int)ort::FLOAT, &input);
  const char *inputs[] = {"images"}, *outputs[] = {"logits"};
  void *output = nullptr, *info = nullptr;
  std::vector<double> times;
  for (int i = number("VIM_REPEAT", 0); i >= 0; --i) {
    output = nullptr;
    const auto start = std::chrono::steady_clock::now();
    run(ort::RUN, session, (void *)nullptr, &inputs[0], &input, (size_t)1, &outputs[0], (size_t)1, &output);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  float *logits = nullptr;
  size_t count = 0;
  run(ort::TENSOR_DATA, output, &logits);
  run(ort::TYPE_AND_SHAPE, output, &info);
  run(ort::ELEMENT_COUNT, info, &count);
  print_classes(logits, count, times);
}

}  // namespace

int main(int count, char **arguments) {
  if (count < 4 || count > 5) {
    std::fprintf(stderr, "usage: classify ONNXRUNTIME_LIBRARY MODEL.onnx PICTURE.ppm [OPERATORS_LIBRARY]\n");
    return 2;
  }
  try {
    classify(arguments[1], arguments[2], arguments[3], count == 5 ? arguments[4] : nullptr);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
