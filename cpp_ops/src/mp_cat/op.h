// MPCat (EDM2, arXiv 2312.02696, equation 103): concatenation along the channels, each part scaled by its weight; activated = mp_silu(y).
#pragma once

#include "common/kernel.h"

namespace scm::mp_cat {

template <typename T>
struct Params {
  const T* a;    // [rows, channels_a]
  const T* b;    // [rows, channels_b]
  T* y;          // [rows, channels_a + channels_b]
  T* activated;  // null if the node does not have this output
  std::int64_t rows, channels_a, channels_b;
  float scale_a, scale_b;
};

SCM_DECLARE_KERNELS

}  // namespace scm::mp_cat
