// NormModulateSiLU (sCM, arXiv 2410.11081, section 4.1, adaptive double normalization), with [s, b] = modulation:
// z = mp_silu(pixel_norm(y) * pixel_norm(s) + pixel_norm(b)).
#pragma once

#include "common/kernel.h"

namespace scm::norm_modulate_silu {

template <typename T>
struct Params {
  const T* y;           // [samples * pixels, channels]
  const T* modulation;  // [samples, 2, channels], modulation_stride elements between samples
  T* z;                 // may be y
  std::int64_t samples, pixels, channels, modulation_stride;
  float eps;
};

SCM_DECLARE_KERNELS

}  // namespace scm::norm_modulate_silu
