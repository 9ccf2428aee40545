// GroupNorm (Wu and He, arXiv 1803.08494), optionally with a modulation per sample and SiLU:
// y = f(((x - mean) / sqrt(variance + eps) * scale + bias) * (1 + s) + b), with [s, b] = modulation, and f = silu or nothing.
// Mean and variance are those of a group: neighboring channels of a sample, with all their pixels. Channels are the second axis.
#pragma once

#include "common/kernel.h"

namespace scm::group_norm {

template <typename T>
struct Params {
  const T* x;           // [samples, channels, pixels]
  const float* scale;   // [channels]
  const float* bias;    // [channels]
  const T* modulation;  // [samples, 2 * channels], or null
  T* y;
  std::int64_t samples, channels, pixels, groups;
  float eps;
  bool silu;
  float* partials = nullptr;  // CUDA: partial_floats(p) of scratch memory, null if that is 0

  std::int64_t group_channels() const { return channels / groups; }
  std::int64_t group_elements() const { return group_channels() * pixels; }
};

// A CUDA kernel may split a group among several blocks. Their number depends on the size of a group only, so that results do not depend on the batch.
constexpr std::int64_t kPartElements = 16384;
constexpr std::int64_t kMaxParts = 64;

constexpr std::int64_t parts_of(std::int64_t group_elements) {
  const std::int64_t parts = (group_elements + kPartElements - 1) / kPartElements;
  return parts < 1 ? 1 : parts < kMaxParts ? parts : kMaxParts;
}

// Floats of scratch memory that the CUDA kernels need: mean, squares and count of each part.
template <typename T>
std::int64_t partial_floats(const Params<T>& p) {
  const std::int64_t parts = parts_of(p.group_elements());
  return parts > 1 ? 3 * parts * p.samples * p.groups : 0;
}

SCM_DECLARE_KERNELS  // unit: group

}  // namespace scm::group_norm
