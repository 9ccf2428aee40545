// ModulateSiLU (EDM2, arXiv 2312.02696, figure 21): z = mp_silu(y * scale), one scale per sample and channel.
#pragma once

#include "common/kernel.h"

namespace scm::modulate_silu {

template <typename T>
struct Params {
  const T* y;      // [samples * pixels, channels]
  const T* scale;  // [samples, channels]
  T* z;            // may be y
  std::int64_t samples, pixels, channels;
};

SCM_DECLARE_KERNELS

}  // namespace scm::modulate_silu
