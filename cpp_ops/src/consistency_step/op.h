// ConsistencyStep (sCM, arXiv 2410.11081, section 3), with t' = t_next:
// x_next = cos t' (cos t x - sin t sigma_data F) + sin t' sigma_data noise. Sines and cosines are computed in double, so that they are the
// same on every device.
#pragma once

#include "common/kernel.h"

namespace scm::consistency_step {

template <typename T>
struct Params {
  const float* x;       // [samples, size]
  const T* F;           // [samples, size]
  const float* noise;   // [samples, size]
  const float* t;       // [samples], radians
  const float* t_next;  // [samples], radians
  float* x_next;        // may be x or noise
  std::int64_t samples, size;
  float sigma_data;
};

SCM_DECLARE_KERNELS

}  // namespace scm::consistency_step
