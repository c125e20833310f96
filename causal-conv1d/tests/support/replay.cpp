// Calls of the C interface recorded on one machine, replayed on another: replay FILE. Every buffer of a call is compared with
// what the recording machine left in it. The file is written by test_other_machine.py.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#define KERNELS(DO)                                                                                                   \
  DO(conv_forward) DO(conv_backward) DO(conv_project) DO(conv_rows_forward) DO(conv_rows_backward) DO(scan_forward)   \
  DO(scan_backward) DO(norm_forward) DO(norm_backward)
#define DECLARE(name) extern "C" void vim_##name(const void *); extern "C" int64_t vim_##name##_size();
KERNELS(DECLARE)

struct Kernel {
  const char *name;
  void (*run)(const void *);
  int64_t (*size)();
};
#define ENTRY(name) {"vim_" #name, vim_##name, vim_##name##_size},
const Kernel kernels[] = {KERNELS(ENTRY)};

struct Buffer {
  int64_t dtype;  // 0 float32, 1 bfloat16
  char *data;
  std::vector<char> expected;
};

FILE *file;

int64_t number() {
  int64_t value;
  if (fread(&value, 8, 1, file) != 1)
    exit(3);
  return value;
}

std::vector<char> bytes(int64_t count) {
  std::vector<char> all((size_t)count);
  if (count && fread(all.data(), (size_t)count, 1, file) != 1)
    exit(3);
  return all;
}

float element(const char *data, int64_t dtype, size_t i) {
  uint32_t bits = 0;
  if (dtype == 0)
    memcpy(&bits, data + 4 * i, 4);
  else
    memcpy((char *)&bits + 2, data + 2 * i, 2);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Largest difference, as a part of the largest value expected.
float distance(const Buffer &b) {
  const size_t count = b.expected.size() / (b.dtype == 0 ? 4 : 2);
  float difference = 0, largest = 1e-30f;
  for (size_t i = 0; i < count; ++i) {
    const float x = element(b.data, b.dtype, i), y = element(b.expected.data(), b.dtype, i);
    if (!(fabsf(x - y) <= difference))
      difference = fabsf(x - y);
    largest = fmaxf(largest, fabsf(y));
  }
  return difference / largest;
}

int main(int, char **arguments) {
  file = fopen(arguments[1], "rb");
  // float32: sums of a few dozen products in another order. bfloat16: one rounding to eight bits may fall the other way.
  const float most[] = {3e-5f, 1.0f / 128};
  int failed = 0;
  for (int64_t calls = number(); calls > 0; --calls) {
    const std::vector<char> text = bytes(number());
    const std::string name(text.begin(), text.end());
    std::vector<char> fields = bytes(number());
    std::vector<Buffer> buffers((size_t)number());
    for (Buffer &b : buffers) {
      b.dtype = number();
      const int64_t size = number();
      const std::vector<char> before = bytes(size);
      b.data = (char *)aligned_alloc(64, (size_t)(size + 127) / 64 * 64);
      memcpy(b.data, before.data(), (size_t)size);
      b.expected = bytes(size);
    }
    for (int64_t pointers = number(); pointers > 0; --pointers) {
      const int64_t at = number(), which = number(), offset = number();
      char *address = buffers[(size_t)which].data + offset;
      memcpy(fields.data() + at, &address, 8);
    }
    const Kernel *kernel = nullptr;
    for (const Kernel &k : kernels)
      if (name == k.name)
        kernel = &k;
    if (!kernel || kernel->size() != (int64_t)fields.size()) {
      printf("%s: no such kernel, or other arguments\n", name.c_str());
      return 1;
    }
    kernel->run(fields.data());
    float worst = 0;
    for (const Buffer &b : buffers) {
      const float d = distance(b);
      worst = d <= worst ? worst : d;
      failed += !(d <= most[b.dtype]);
      free(b.data);
    }
    printf("%s %.1e\n", name.c_str(), worst);
  }
  return failed ? 1 : 0;
}
