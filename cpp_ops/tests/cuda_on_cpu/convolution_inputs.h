// Inputs of convolutions, and their results in double.
#pragma once

#include <string>
#include <vector>

#include "convolution/op.h"
#include "values.h"

namespace scm::testing {

constexpr float kClip = 1.5f, kWeightSkip = 0.919f, kWeightSum = 0.394f;
inline const convolution::Device kA100{80, 108}, kH200{90, 132};

inline std::string text(const convolution::Sizes& s) {
  return std::to_string(s.samples) + " x " + std::to_string(s.height) + " x " + std::to_string(s.width) + ", " + std::to_string(s.in) + " to " + std::to_string(s.out) +
         " channels, " + std::to_string(s.taps) + " taps";
}

// The inputs of a convolution. The terms of a sum have a variance of 1 / terms, so that sums are of size 1.
template <typename T>
struct Inputs {
  convolution::Sizes sizes;
  std::vector<T> x, weight, scales, skip;
  std::int64_t scales_stride;

  explicit Inputs(const convolution::Sizes& s)
      : sizes(s),
        x(random<T>(s.samples * s.pixels() * s.in, 1)),
        weight(random<T>(s.out * s.in * s.taps, 2, 1 / std::sqrt(static_cast<double>(s.in * s.taps)))),
        scales(random<T>(s.samples * 2 * padded_out(s), 3)),
        skip(random<T>(s.samples * s.pixels() * s.out, 4)),
        scales_stride(2 * padded_out(s)) {}

  static std::int64_t padded_out(const convolution::Sizes& s) { return convolution::padded(s.out); }

  // Sample `sample` of `from` alone.
  Inputs(const Inputs& from, std::int64_t sample) : Inputs(from) {
    sizes.samples = 1;
    const auto keep = [&](std::vector<T>& values) {
      const std::size_t size = values.size() / static_cast<std::size_t>(from.sizes.samples), first = size * static_cast<std::size_t>(sample);
      values = std::vector<T>(values.begin() + first, values.begin() + first + size);
    };
    keep(x);
    keep(scales);
    keep(skip);
  }
};

template <typename T>
Values sums_of(const Inputs<T>& in) {
  const convolution::Sizes& s = in.sizes;
  const Values x = to_doubles(in.x), weight = to_doubles(in.weight);
  Values transposed(weight.size());  // [taps, in, out]
  for (std::int64_t o = 0; o < s.out; ++o) {
    for (std::int64_t c = 0; c < s.in; ++c) {
      for (int tap = 0; tap < s.taps; ++tap) transposed[(tap * s.in + c) * s.out + o] = s.taps == 9 ? weight[(o * s.in + c) * 9 + tap] : weight[c * s.out + o];
    }
  }
  Values sums(static_cast<std::size_t>(s.samples * s.pixels() * s.out));
  for (std::int64_t pixel = 0; pixel < s.samples * s.pixels(); ++pixel) {
    double* const sum = sums.data() + pixel * s.out;
    for (int tap = 0; tap < s.taps; ++tap) {
      const std::int64_t i = pixel / s.width % s.height + (s.taps == 9 ? tap / 3 - 1 : 0), j = pixel % s.width + (s.taps == 9 ? tap % 3 - 1 : 0);
      if (i < 0 || i >= s.height || j < 0 || j >= s.width) continue;
      const double* from = x.data() + ((pixel / s.pixels() * s.height + i) * s.width + j) * s.in;
      for (std::int64_t c = 0; c < s.in; ++c) {
        for (std::int64_t o = 0; o < s.out; ++o) sum[o] += from[c] * transposed[(tap * s.in + c) * s.out + o];
      }
    }
  }
  return sums;
}

template <typename T>
Values epilogue_of(const Inputs<T>& in, convolution::Epilogue epilogue, Values sums) {
  const Values scales = to_doubles(in.scales), skip = to_doubles(in.skip);
  const convolution::Sizes& s = in.sizes;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (epilogue == convolution::Epilogue::modulate_silu) {
      const auto sample = static_cast<std::int64_t>(i) / (s.pixels() * s.out), channel = static_cast<std::int64_t>(i) % s.out;
      sums[i] = mp_silu_of(sums[i] * scales[static_cast<std::size_t>(sample * in.scales_stride + channel)]);
    } else if (epilogue == convolution::Epilogue::mp_sum) {
      const double sum = skip[i] * double{kWeightSkip} + sums[i] * double{kWeightSum};
      sums[i] = sum < -kClip ? -kClip : sum > kClip ? kClip : sum;
    }
  }
  return sums;
}

}  // namespace scm::testing
