// DepthwiseGLU, the middle of SANA's feed-forward block (arXiv 2410.10629, Mix-FFN): y = a * silu(g), with [a, g] the halves of the channels of a depthwise
// 3x3 convolution of silu(x), with zero padding and a bias.
#pragma once

#include "common/kernel.h"

namespace scm::depthwise_glu {

template <typename T>
struct Params {
  const T* x;  // [samples, 2, channels, height, width]
  const T* w;  // [2, channels, 3, 3]
  const T* b;  // [2, channels]
  T* y;        // [samples, channels, height, width]
  std::int64_t samples, channels, height, width;
};

SCM_DECLARE_KERNELS

}  // namespace scm::depthwise_glu
