// y = a * gelu(g), with [a, g] = x + b. A thread processes two vectors of 16 bytes, or two elements. The bias is read from the cache.
#include "common/cuda.h"
#include "geglu/op.h"

namespace scm::geglu {
namespace {

template <typename T, int kWidth>
struct Halves {
  Vector<T, kWidth> a, g, bias_a, bias_g;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  const std::int64_t channels = p.channels / kWidth;
  for_each(
      p.rows * channels,
      [&](std::int64_t i) {
        const std::int64_t row = quotient(i, channels), c = i - row * channels, start = 2 * row * channels + c;
        return Halves<T, kWidth>{load<kWidth>(p.x, start), load<kWidth>(p.x, start + channels), load<kWidth>(p.b, c), load<kWidth>(p.b, c + channels)};
      },
      [&](std::int64_t i, const Halves<T, kWidth>& in) {
        store(p.y, i, vector_of<T, kWidth>([&](int c) { return (in.a[c] + in.bias_a[c]) * gelu(in.g[c] + in.bias_g[c]); }));
      });
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  constexpr int width = kVectorWidth<T>;
  const std::int64_t count = p.rows * p.channels;
  if (p.channels % width == 0 && aligned(16, p.x, p.b, p.y)) {
    return launch(kernel<T, width>, grid_of(count / width, kElementsPerBlock), kThreads, stream, p);
  }
  return launch(kernel<T, 1>, grid_of(count, kElementsPerBlock), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::geglu
