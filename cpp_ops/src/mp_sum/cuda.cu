// y = clamp(a * weight_a + b * weight_b, -clip, clip), and mp_silu(y) if `activated` is not null. A thread processes two vectors of 16 bytes, or two elements.
#include "common/cuda.h"
#include "mp_sum/op.h"

namespace scm::mp_sum {
namespace {

template <typename T, int kWidth>
struct Pair {
  Vector<T, kWidth> a, b;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  for_each(
      p.count / kWidth, [&](std::int64_t i) { return Pair<T, kWidth>{load<kWidth>(p.a, i), load<kWidth>(p.b, i)}; },
      [&](std::int64_t i, const Pair<T, kWidth>& in) {
        const auto y = vector_of<T, kWidth>([&](int c) { return clamp(in.a[c] * p.weight_a + in.b[c] * p.weight_b, p.clip); });
        store(p.y, i, y);
        if (p.activated) store(p.activated, i, activate(y));
      });
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  if (p.count % kVectorWidth<T> == 0 && aligned(16, p.a, p.b, p.y, p.activated)) {
    return launch(kernel<T, kVectorWidth<T>>, grid_of(p.count / kVectorWidth<T>, kElementsPerBlock), kThreads, stream, p);
  }
  return launch(kernel<T, 1>, grid_of(p.count, kElementsPerBlock), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::mp_sum
