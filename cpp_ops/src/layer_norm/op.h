// Normalizations over the last axis, in float32, optionally with a modulation per sample:
//   LayerNorm (Ba, Kiros and Hinton, arXiv 1607.06450)  y = (x - mean) / sqrt(variance + eps) * scale + bias
//   LayerNormModulate (DiT, arXiv 2212.09748, adaLN)    y = (x - mean) / sqrt(variance + eps) * (1 + s) + b, with one s and one b per sample
//   RMSNorm (Zhang and Sennrich, arXiv 1910.07467)      y = x / sqrt(mean(x^2) + eps) * scale
#pragma once

#include "common/kernel.h"

namespace scm::layer_norm {

template <typename T>
struct Params {
  const T* x;            // [samples, rows, channels]
  const float* scale;    // [channels], or null: 1
  const float* bias;     // [channels], or null: 0
  const T* modulation_scale;  // [samples, channels], or null
  const T* modulation_shift;  // [samples, channels], or null
  T* y;
  std::int64_t samples, rows, channels;
  float eps;
  bool subtracts_mean;  // false: RMSNorm
};

SCM_DECLARE_KERNELS  // unit: row

}  // namespace scm::layer_norm
