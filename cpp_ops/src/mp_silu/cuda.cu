// y = mp_silu(x). A thread processes two vectors of 16 bytes, or two elements.
#include "common/cuda.h"
#include "mp_silu/op.h"

namespace scm::mp_silu {
namespace {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  for_each(
      p.count / kWidth, [&](std::int64_t i) { return load<kWidth>(p.x, i); },
      [&](std::int64_t i, const Vector<T, kWidth>& x) { store(p.y, i, activate(x)); });
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  if (p.count % kVectorWidth<T> == 0 && aligned(16, p.x, p.y)) {
    return launch(kernel<T, kVectorWidth<T>>, grid_of(p.count / kVectorWidth<T>, kElementsPerBlock), kThreads, stream, p);
  }
  return launch(kernel<T, 1>, grid_of(p.count, kElementsPerBlock), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::mp_silu
