#include "common/math.h"
#include "modulate_silu/op.h"

namespace scm::modulate_silu {
namespace {

template <typename T>
void modulate(const T* y, const T* scale, T* z, std::int64_t channels) {
#pragma omp simd
  for (std::int64_t c = 0; c < channels; ++c) {
    const float factor = to_float(scale[c]);
    z[c] = from_float<T>(activate(to_float(y[c]) * factor));
  }
}

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    modulate(p.y + row * p.channels, p.scale + row / p.pixels * p.channels, p.z + row * p.channels, p.channels);
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::modulate_silu
