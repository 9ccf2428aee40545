// ReLULinearAttention (SANA, arXiv 2410.10629, section 2.2): y = q (k^T v) / (q k^T 1 + eps) per head, with q and k after a ReLU.
#pragma once

#include "common/kernel.h"

namespace scm::relu_linear_attention {

template <typename T>
struct Params {
  const T *q, *k, *v;  // [samples, length, heads, head_size]
  T* y;                // [samples, length, heads, head_size]
  std::int64_t samples, length, heads, head_size;
  float eps;
  bool* out_of_memory;  // CPU: set to true if a thread fails to allocate scratch memory; null on CUDA
};

SCM_DECLARE_KERNELS

}  // namespace scm::relu_linear_attention
