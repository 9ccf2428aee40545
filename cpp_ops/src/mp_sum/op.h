// MPSum (EDM2, arXiv 2312.02696, equation 88): y = clamp(((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), -clip, clip); activated = mp_silu(y).
#pragma once

#include "common/kernel.h"

namespace scm::mp_sum {

template <typename T>
struct Params {
  const T* a;
  const T* b;
  T* y;          // may be a or b
  T* activated;  // null if the node does not have this output
  std::int64_t count;
  float weight_a, weight_b, clip;
};

SCM_DECLARE_KERNELS

}  // namespace scm::mp_sum
