// GEGLU (arXiv 2002.05202): y = a * gelu(g), with [a, g] = x + b over the channels and the exact gelu.
#pragma once

#include "common/kernel.h"

namespace scm::geglu {

template <typename T>
struct Params {
  const T* x;  // [rows, 2, channels]
  const T* b;  // [2, channels]
  T* y;        // [rows, channels]
  std::int64_t rows, channels;
};

SCM_DECLARE_KERNELS

}  // namespace scm::geglu
