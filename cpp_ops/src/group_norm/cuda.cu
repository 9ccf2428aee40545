// A block of threads normalizes a group: it reads the group for the moments, and again, mostly from the caches, for the result. A large group is split into
// parts, each with a block of its own: one launch stores the moments of the parts, a second one merges them and normalizes.
#include "common/moments.cuh"
#include "group_norm/op.h"

namespace scm::group_norm {
namespace {

// A part of a group, in vectors.
struct Part {
  std::int64_t group, begin, end;

  template <typename T, int kWidth>
  static __device__ __forceinline__ Part of(const Params<T>& p, std::int64_t unit, std::int64_t parts, Constant<kWidth>) {
    const std::int64_t vectors = p.group_elements() / kWidth, size = ceil_div(vectors, parts), group = quotient(unit, parts);
    const std::int64_t begin = (unit - group * parts) * size, end = begin + size;
    return {group, begin < vectors ? begin : vectors, end < vectors ? end : vectors};
  }
};

template <typename T, int kWidth>
__device__ __forceinline__ Moments moments_of_part(const Params<T>& p, const Part& part) {
  const T* x = p.x + part.group * p.group_elements();
  Moments moments{0, 0, 0};
#pragma unroll 4
  for (std::int64_t v = part.begin + threadIdx.x; v < part.end; v += kThreads) moments = merge(moments, moments_of(load<kWidth>(x, v)));
  return block_moments(moments);
}

template <typename T, int kWidth>
__device__ __forceinline__ void normalize(const Params<T>& p, const Part& part, const Moments& moments) {
  const std::int64_t start = part.group * p.group_elements();
  const std::int64_t sample = quotient(part.group, p.groups), first = (part.group - sample * p.groups) * p.group_channels();
  const float inverse = 1.0f / sqrtf(moments.squares / moments.count + p.eps);
#pragma unroll 2
  for (std::int64_t v = part.begin + threadIdx.x; v < part.end; v += kThreads) {
    const std::int64_t channel = first + quotient(v * kWidth, p.pixels);
    const float scale = p.scale[channel], bias = p.bias[channel];
    float gain = 1, shift = 0;
    if (p.modulation) {
      const T* modulation = p.modulation + sample * 2 * p.channels + channel;
      gain = 1.0f + to_float(modulation[0]);
      shift = to_float(modulation[p.channels]);
    }
    const Vector<T, kWidth> x = load<kWidth>(p.x + start, v);
    store(p.y + start, v, vector_of<T, kWidth>([&](int i) {
      const float y = ((x[i] - moments.mean) * inverse * scale + bias) * gain + shift;  // combined factors could make an infinite one NaN
      return p.silu ? silu(y) : y;
    }));
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) whole_groups(const Params<T> p) {
  for (std::int64_t group = blockIdx.x; group < p.samples * p.groups; group += gridDim.x) {
    const Part part = Part::of(p, group, 1, Constant<kWidth>{});
    normalize<T, kWidth>(p, part, moments_of_part<T, kWidth>(p, part));
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) moments_of_parts(const Params<T> p, std::int64_t parts) {
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.groups * parts; unit += gridDim.x) {
    const Moments moments = moments_of_part<T, kWidth>(p, Part::of(p, unit, parts, Constant<kWidth>{}));
    if (threadIdx.x == 0) reinterpret_cast<Moments*>(p.partials)[unit] = moments;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) normalized_parts(const Params<T> p, std::int64_t parts) {
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.groups * parts; unit += gridDim.x) {
    const Part part = Part::of(p, unit, parts, Constant<kWidth>{});
    Moments own{0, 0, 0};
    if (threadIdx.x < parts) own = reinterpret_cast<const Moments*>(p.partials)[part.group * parts + threadIdx.x];
    normalize<T, kWidth>(p, part, block_moments(own));
  }
}

template <typename T, int kWidth>
const char* launch_all(const Params<T>& p, void* stream) {
  const std::int64_t groups = p.samples * p.groups, parts = parts_of(p.group_elements());
  if (parts == 1) return launch(whole_groups<T, kWidth>, grid_of(groups, 1), kThreads, stream, p);
  const char* const error = launch(moments_of_parts<T, kWidth>, grid_of(groups * parts, 1), kThreads, stream, p, parts);
  return error ? error : launch(normalized_parts<T, kWidth>, grid_of(groups * parts, 1), kThreads, stream, p, parts);
}

static_assert(kMaxParts <= kThreads);

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  const bool wide = p.pixels % kVectorWidth<T> == 0 && aligned(16, p.x, p.y);
  return wide ? launch_all<T, kVectorWidth<T>>(p, stream) : launch_all<T, 1>(p, stream);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::group_norm
