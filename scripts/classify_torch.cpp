// Classify a picture with a package of AOTInductor and the native kernels, without Python.
//
// docs/deploy.md says how to build this and how to make a package. The picture is a binary PPM of the model's size.
// Prints the five likeliest classes, one a line: index, probability. Environment: VIM_THREADS (default 1); VIM_BATCH, how
// often the picture is in a batch (default 1); VIM_REPEAT: that many runs more, whose median time in ms is printed.
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>

#include "picture.h"

namespace {

void classify(const char *package, const char *file) {
  Picture picture = read_picture(file);
  at::set_num_threads(number("VIM_THREADS", 1));
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // a package does not look at the sizes of a picture otherwise
  const c10::InferenceMode without_gradients;
  torch::inductor::AOTIModelPackageLoader model(package);
  const at::Tensor image = at::from_blob(picture.values.data(), {1, 3, picture.height, picture.width});
  const at::Tensor images = image.expand({number("VIM_BATCH", 1), -1, -1, -1}).contiguous();
  at::Tensor logits;
  std::vector<double> times;
  for (int i = number("VIM_REPEAT", 0); i >= 0; --i) {
    const auto start = std::chrono::steady_clock::now();
    logits = model.run({images})[0];
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  print_classes(logits.const_data_ptr<float>(), logits.size(1), times);
}

}  // namespace

int main(int count, char **arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: classify_torch PACKAGE.pt2 PICTURE.ppm\n");
    return 2;
  }
  try {
    classify(arguments[1], arguments[2]);
  } catch (const c10::Error &error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return 2;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
