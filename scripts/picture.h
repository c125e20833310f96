// What the programs that classify a picture share: reading it, and printing the likeliest classes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
  int64_t width = 0, height = 0;
  std::vector<float> values;  // (3, height, width), normalised as for ImageNet
};

inline Picture read_picture(const char *file) {
  std::ifstream stream(file, std::ios::binary);
  std::string magic;
  int64_t largest = 0;
  Picture p;
  stream >> magic >> p.width >> p.height >> largest;
  if (!stream || magic != "P6" || largest != 255 || p.width < 1 || p.height < 1 || p.width * p.height > 1 << 28)
    throw std::runtime_error(std::string(file) + " is not a binary PPM of eight bits without comments");
  stream.get();
  const int64_t pixels = p.width * p.height;
  std::vector<unsigned char> bytes(3 * pixels);
  if (!stream.read((char *)bytes.data(), (std::streamsize)bytes.size()))
    throw std::runtime_error(std::string(file) + " is cut off");
  const float mean[] = {0.485f, 0.456f, 0.406f}, deviation[] = {0.229f, 0.224f, 0.225f};
  p.values.resize(3 * pixels);
  for (int c = 0; c < 3; ++c)
    for (int64_t i = 0; i < pixels; ++i)
      p.values[c * pixels + i] = (bytes[3 * i + c] / 255.0f - mean[c]) / deviation[c];
  return p;
}

inline int number(const char *name, int otherwise) {
  const char *text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

// The five likeliest classes, one a line: index, probability; and the median of the times in ms, if there are several.
inline void print_classes(const float *logits, size_t count, std::vector<double> times) {
  const float largest = *std::max_element(logits, logits + count);
  std::vector<float> p(count);
  std::transform(logits, logits + count, p.begin(), [=](float x) { return std::exp(x - largest); });
  const float sum = std::accumulate(p.begin(), p.end(), 0.0f);
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const size_t shown = std::min<size_t>(5, count);
  std::partial_sort(order.begin(), order.begin() + shown, order.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
  for (size_t i = 0; i < shown; ++i)
    std::printf("%zu %.6f\n", order[i], p[order[i]] / sum);
  if (times.size() > 1) {
    std::sort(times.begin(), times.end());
    std::printf("median %.2f ms\n", times[times.size() / 2]);
  }
}
