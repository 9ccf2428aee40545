// The three transforms of F(4x4, 3x3) with the points 0, 1, -1, 2, -2 and infinity, on vectors of channels.
//
// The usual matrix G contains fractions. Here they are factors of the rows of B^T instead: G = D G', and V = (D B^T) x (D B^T)^T. What remains are additions
// and multiplications by powers of two, which are exact, so it does not matter to the results where a compiler fuses multiply-adds.
#pragma once

#include "common/simd.h"

namespace scm::winograd {
inline namespace SCM_ISA {

constexpr float kScale[6] = {1.0f / 4, -1.0f / 6, -1.0f / 6, 1.0f / 24, 1.0f / 24, 1};  // the diagonal of D

// One dimension of B^T x.
inline void transform_input(const Vector (&x)[6], Vector (&to)[6]) {
  const Vector even = x[4] - 4.0f * x[2], odd = x[3] - 4.0f * x[1], outer = x[4] - x[2], twice = 2.0f * (x[3] - x[1]);
  to[0] = 4.0f * (x[0] - x[2]) + outer;
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = outer + twice;
  to[4] = outer - twice;
  to[5] = (x[5] - x[3]) - 2.0f * twice;
}

// Row kRow of G' applied to a column (a, b, c).
template <int kRow>
inline Vector transformed_weight(Vector a, Vector b, Vector c) {
  if constexpr (kRow == 0) return a;
  if constexpr (kRow == 1) return (a + c) + b;
  if constexpr (kRow == 2) return (a + c) - b;
  if constexpr (kRow == 3) return (a + 4.0f * c) + 2.0f * b;
  if constexpr (kRow == 4) return (a + 4.0f * c) - 2.0f * b;
  return c;
}

// One dimension of A^T m.
inline void transform_output(const Vector (&m)[6], Vector (&to)[4]) {
  const Vector sum = m[1] + m[2], difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
  to[0] = m[0] + sum + far_sum;
  to[1] = difference + 2.0f * far_difference;
  to[2] = sum + 4.0f * far_sum;
  to[3] = difference + 8.0f * far_difference + m[5];
}

}  // namespace SCM_ISA
}  // namespace scm::winograd
