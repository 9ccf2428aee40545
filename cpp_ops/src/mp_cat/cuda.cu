// y = [a * scale_a, b * scale_b] along the channels, and mp_silu(y) if `activated` is not null. A thread writes two vectors of 16 bytes, or two elements; a
// vector comes either from a or from b.
#include "common/cuda.h"
#include "mp_cat/op.h"

namespace scm::mp_cat {
namespace {

template <typename T, int kWidth>
struct Part {
  Vector<T, kWidth> x;
  float scale;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  const std::int64_t a = p.channels_a / kWidth, b = p.channels_b / kWidth;
  for_each(
      p.rows * (a + b),
      [&](std::int64_t i) {
        const std::int64_t row = quotient(i, a + b), c = i - row * (a + b);
        return c < a ? Part<T, kWidth>{load<kWidth>(p.a, row * a + c), p.scale_a} : Part<T, kWidth>{load<kWidth>(p.b, row * b + c - a), p.scale_b};
      },
      [&](std::int64_t i, const Part<T, kWidth>& part) {
        const auto y = vector_of<T, kWidth>([&](int c) { return part.x[c] * part.scale; });
        store(p.y, i, y);
        if (p.activated) store(p.activated, i, activate(y));
      });
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  constexpr int width = kVectorWidth<T>;
  const std::int64_t count = p.rows * (p.channels_a + p.channels_b);
  if (p.channels_a % width == 0 && p.channels_b % width == 0 && aligned(16, p.a, p.b, p.y, p.activated)) {
    return launch(kernel<T, width>, grid_of(count / width, kElementsPerBlock), kThreads, stream, p);
  }
  return launch(kernel<T, 1>, grid_of(count, kElementsPerBlock), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::mp_cat
