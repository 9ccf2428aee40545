// z = mp_silu(y * scale), one scale per sample and channel. blockIdx.y is the sample. A thread processes two vectors of 16 bytes, or two elements. The scales,
// one row per sample, are read from the cache.
#include "common/cuda.h"
#include "modulate_silu/op.h"

namespace scm::modulate_silu {
namespace {

template <typename T, int kWidth>
struct Pair {
  Vector<T, kWidth> y, scale;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  const std::int64_t channels = p.channels / kWidth;
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const T* y = p.y + sample * p.pixels * p.channels;
    const T* scale = p.scale + sample * p.channels;
    T* z = p.z + sample * p.pixels * p.channels;
    for_each(
        p.pixels * channels,
        [&](std::int64_t i) { return Pair<T, kWidth>{load<kWidth>(y, i), load<kWidth>(scale, i - quotient(i, channels) * channels)}; },
        [&](std::int64_t i, const Pair<T, kWidth>& in) { store(z, i, vector_of<T, kWidth>([&](int c) { return activate(in.y[c] * in.scale[c]); })); });
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  constexpr int width = kVectorWidth<T>;
  const std::int64_t count = p.pixels * p.channels;
  if (p.channels % width == 0 && aligned(16, p.y, p.scale, p.z)) {
    return launch(kernel<T, width>, grid_of(count / width, kElementsPerBlock, p.samples), kThreads, stream, p);
  }
  return launch(kernel<T, 1>, grid_of(count, kElementsPerBlock, p.samples), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::modulate_silu
