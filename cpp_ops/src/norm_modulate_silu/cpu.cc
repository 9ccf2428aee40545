#include "common/rows.h"
#include "norm_modulate_silu/op.h"

namespace scm::norm_modulate_silu {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  std::int64_t sample = -1;
  float norm_scale = 0, norm_shift = 0;
  for (std::int64_t row = begin; row < end; ++row) {
    const T* scale = p.modulation + row / p.pixels * p.modulation_stride;
    const T* shift = scale + p.channels;
    if (row / p.pixels != sample) {
      sample = row / p.pixels;
      norm_scale = row_norm_factor(scale, p.channels, p.eps);
      norm_shift = row_norm_factor(shift, p.channels, p.eps);
    }
    const T* y = p.y + row * p.channels;
    T* z = p.z + row * p.channels;
    const float factor = row_norm_factor(y, p.channels, p.eps) * norm_scale;
#pragma omp simd
    for (std::int64_t c = 0; c < p.channels; ++c) z[c] = from_float<T>(activate(to_float(y[c]) * factor * to_float(scale[c]) + to_float(shift[c]) * norm_shift));
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::norm_modulate_silu
