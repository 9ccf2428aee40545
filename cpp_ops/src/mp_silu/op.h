// MPSiLU (EDM2, arXiv 2312.02696, equation 81): y = silu(x) / 0.596.
#pragma once

#include "common/kernel.h"

namespace scm::mp_silu {

template <typename T>
struct Params {
  const T* x;
  T* y;  // may be x
  std::int64_t count;
};

SCM_DECLARE_KERNELS

}  // namespace scm::mp_silu
