// PhiloxNormal: element e of draw d for a seed, from Philox4x32-10 (Salmon et al., SC 2011) with counter (d, 0, e low, e high) and key (seed low, seed
// high), by the Box-Muller transform of cuRAND; times scale. Always float32.
#pragma once

#include "common/kernel.h"

namespace scm::philox_normal {

template <typename T>
struct Params {
  const std::int64_t* seeds;  // [samples]
  const std::int64_t* draw;   // [], in [0, 2^32)
  const float* scale;         // []
  T* noise;                   // [samples, size]
  std::int64_t samples, size;
};

SCM_DECLARE_KERNELS

}  // namespace scm::philox_normal
