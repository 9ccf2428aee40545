// Arithmetic of PhiloxNormal for CPU and CUDA: integers, one rounding to float as in cuRAND, and double after that.
#pragma once

#include "common/math.h"

namespace scm {
inline namespace SCM_ISA {

SCM_HD double square_root(double x) {
#ifdef __CUDA_ARCH__
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// Returns ln u for a float u in (0, 1]: u = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)), as a series with a remainder below 1e-14.
SCM_HD double logarithm(float u) {
  const std::uint32_t bits = bits_of(u);
  const bool upper = (bits & 0x7fffffu) > 0x3504f3u;  // m above sqrt(2)
  const double exponent = static_cast<double>(static_cast<std::int32_t>(bits >> 23) - 127 + (upper ? 1 : 0));
  const double m = static_cast<double>(float_of((bits & 0x7fffffu) | (upper ? 0x3f000000u : 0x3f800000u)));
  const double s = (m - 1) / (m + 1), s2 = s * s;
  double series = 1.0 / 17;
  series = series * s2 + 1.0 / 15;
  series = series * s2 + 1.0 / 13;
  series = series * s2 + 1.0 / 11;
  series = series * s2 + 1.0 / 9;
  series = series * s2 + 1.0 / 7;
  series = series * s2 + 1.0 / 5;
  series = series * s2 + 1.0 / 3;
  return exponent * 0.69314718055994530942 + 2 * (s + s * s2 * series);
}

// Returns sin v for v in [0, 2 pi]: the Taylor series in the distance to the nearest multiple of pi, with a remainder below 1e-13.
SCM_HD double sine(double v) {
  constexpr double pi = 3.14159265358979323846;
  const double turns = v < pi / 2 ? 0.0 : v < 3 * pi / 2 ? 1.0 : 2.0;
  const double r = v - turns * pi, r2 = r * r;
  double series = 1.0 / 355687428096000;  // 1 / 17!
  series = series * r2 - 1.0 / 1307674368000;
  series = series * r2 + 1.0 / 6227020800;
  series = series * r2 - 1.0 / 39916800;
  series = series * r2 + 1.0 / 362880;
  series = series * r2 - 1.0 / 5040;
  series = series * r2 + 1.0 / 120;
  series = series * r2 - 1.0 / 6;
  const double value = r + r * r2 * series;
  return turns == 1.0 ? -value : value;
}

// Returns element `element` of draw `draw` for a seed: Philox4x32-10 followed by the Box-Muller transform (see op.h).
SCM_HD float standard_normal(std::uint64_t seed, std::uint32_t draw, std::uint64_t element) {
  std::uint32_t c0 = draw, c1 = 0, c2 = static_cast<std::uint32_t>(element), c3 = static_cast<std::uint32_t>(element >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0, product1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(product1);
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const float u = static_cast<float>(c0) * 0x1p-32f + 0x1p-33f;  // this product is exact
  const float v = rounded_product(static_cast<float>(c1), 1.46291808e-9f) + 7.31459042e-10f;
  return static_cast<float>(square_root(-2.0 * logarithm(u)) * sine(static_cast<double>(v)));
}

}  // namespace SCM_ISA
}  // namespace scm
