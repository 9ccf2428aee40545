// The elementwise functions of common/math.h for the vectors of common/simd.h.
#pragma once

#include "common/simd.h"

namespace scm {
inline namespace SCM_ISA {

typedef std::uint32_t Integers __attribute__((vector_size(sizeof(Vector))));

// Returns e^x to about 1 ulp for |x| <= 87, infinity for 88.5 <= x <= 89, and NaN for NaN.
inline Vector exponential(Vector x) {
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest to x / ln 2 lands in the low bits
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * reinterpret_cast<Vector>((reinterpret_cast<Integers>(shifted) << 23) + 0x3f800000);
}

// Returns silu(x) = x / (1 + e^-x). NaN for NaN and -infinity, as in the formula.
inline Vector silu(Vector x) {
  Vector y = -x;
  y = y < -87.0f ? broadcast(-87.0f) : y;
  y = y > 89.0f ? broadcast(89.0f) : y;
  return x / (1.0f + exponential(y));
}

// Returns the sum of all lanes.
inline float sum_of_lanes(Vector x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace SCM_ISA
}  // namespace scm
