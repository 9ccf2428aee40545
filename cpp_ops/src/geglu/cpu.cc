#include "common/math.h"
#include "geglu/op.h"

namespace scm::geglu {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T *a = p.x + 2 * row * p.channels, *g = a + p.channels, *bias_a = p.b, *bias_g = p.b + p.channels;
    T* y = p.y + row * p.channels;
#pragma omp simd
    for (std::int64_t c = 0; c < p.channels; ++c) {
      y[c] = from_float<T>((to_float(a[c]) + to_float(bias_a[c])) * gelu(to_float(g[c]) + to_float(bias_g[c])));
    }
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::geglu
