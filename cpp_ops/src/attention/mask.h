// Masks on CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace scm::attention {
inline namespace SCM_ISA {

constexpr float kLog2e = 1.44269504f;
constexpr float kMinusInfinity = -__builtin_inff();

// Returns an element of a mask in units of ln 2. Finite values stay finite: masks are often filled with the lowest number.
SCM_HD float bias_of(float mask) {
  constexpr float kLargest = 3.402823466e38f;
  const float bias = mask * kLog2e;
  return mask - mask != 0 ? bias : bias > kLargest ? kLargest : bias < -kLargest ? -kLargest : bias;
}

// Returns true if the mask of a query is -infinity for all keys.
template <typename T>
SCM_HD bool hides_all(const T* mask, std::int64_t keys) {
  for (std::int64_t key = 0; key < keys; ++key) {
    if (to_float(mask[key]) != kMinusInfinity) return false;
  }
  return true;
}

}  // namespace SCM_ISA
}  // namespace scm::attention
