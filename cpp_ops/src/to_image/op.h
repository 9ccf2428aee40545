// ToImage: round(clamp(x * scale + offset, 0, 255)) as uint8, to nearest even, channels first to channels last; NaN gives 0.
#pragma once

#include "common/kernel.h"

namespace scm::to_image {

template <typename T>
struct Params {
  const T* x;           // [samples, channels, pixels]
  std::uint8_t* image;  // [samples, pixels, channels]
  std::int64_t samples, channels, pixels;
  float scale, offset;
};

SCM_DECLARE_KERNELS

}  // namespace scm::to_image
