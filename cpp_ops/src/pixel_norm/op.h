// PixelNorm (EDM2, arXiv 2312.02696, equation 30): y = x / (eps + |x| / sqrt(C)) over the last axis; activated = mp_silu(y).
#pragma once

#include "common/kernel.h"

namespace scm::pixel_norm {

template <typename T>
struct Params {
  const T* x;    // [rows, channels]
  T* y;          // may be x
  T* activated;  // null if the node does not have this output
  std::int64_t rows, channels;
  float eps;
};

SCM_DECLARE_KERNELS

}  // namespace scm::pixel_norm
