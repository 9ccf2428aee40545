#include "common/math.h"
#include "modulate_silu/op.h"

namespace scm::modulate_silu {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* y = p.y + row * p.channels;
    const T* scale = p.scale + row / p.pixels * p.channels;
    T* z = p.z + row * p.channels;
#pragma omp simd
    for (std::int64_t c = 0; c < p.channels; ++c) z[c] = from_float<T>(activate(to_float(y[c]) * to_float(scale[c])));
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::modulate_silu
