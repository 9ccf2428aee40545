// Row operations of the CPU kernels. A row is one pixel's channels.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace scm {
inline namespace SCM_ISA {

// Returns the factor of pixel normalization for a row.
template <typename T>
float row_norm_factor(const T* x, std::int64_t channels, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t c = 0; c < channels; ++c) sum += to_float(x[c]) * to_float(x[c]);
  return inverse_norm(sum, static_cast<float>(channels), eps);
}

// Computes y = x * scale and, unless `activated` is null, activated = mp_silu(y). y may be x.
template <typename T>
void scale_row(const T* x, T* y, T* activated, std::int64_t channels, float scale) {
#pragma omp simd
  for (std::int64_t c = 0; c < channels; ++c) y[c] = from_float<T>(to_float(x[c]) * scale);
  if (!activated) return;
#pragma omp simd
  for (std::int64_t c = 0; c < channels; ++c) activated[c] = from_float<T>(activate(to_float(y[c])));
}

}  // namespace SCM_ISA
}  // namespace scm
