// Elementwise arithmetic for CPU and CUDA kernels. EDM2 is arXiv 2312.02696.
#pragma once

#include "common/types.h"

namespace scm {
inline namespace SCM_ISA {

// Returns x with its magnitude clamped to `bound`; NaN gives `bound` with its sign. Uses an integer minimum: with a float selection, compilers evaluate
// both branches of the code that follows, and there denormal numbers cost about a hundred cycles each.
SCM_HD float clamp_magnitude(float x, float bound) {
  const std::uint32_t magnitude = bits_of(x) & 0x7fffffffu, limit = bits_of(bound);
  return float_of((magnitude < limit ? magnitude : limit) | (bits_of(x) & 0x80000000u));
}

// Clamps x to [-87, 89], the range of `exponential`; NaN gives one of the bounds. Uses integers for the same reason as clamp_magnitude: as signed integers all
// negative floats are below 89, and as unsigned integers all positive floats are below -87.
SCM_HD float clamp_exponent(float x) {
  const auto bits = static_cast<std::int32_t>(bits_of(x)), upper = static_cast<std::int32_t>(bits_of(89.0f));
  const auto at_most_89 = static_cast<std::uint32_t>(bits < upper ? bits : upper);
  const std::uint32_t lower = bits_of(-87.0f);
  return float_of(at_most_89 < lower ? at_most_89 : lower);
}

// Returns e^x to about 1 ulp for |x| <= 87, and infinity for 88.5 <= x <= 89. Has no branches or tables, so that loops over it vectorize.
SCM_HD float exponential(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest to x / ln 2 lands in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
#endif
}

// Returns mp_silu(x) = silu(x) / 0.596 (EDM2, equation 81). For large negative x the denominator is infinite: the result is 0, and NaN for -infinity, as in the
// formula.
SCM_HD float activate(float x) {
  const float denominator = 1.0f + exponential(clamp_exponent(-x));
#ifdef __CUDA_ARCH__
  return __fdividef(x, denominator) * (1.0f / 0.596f);
#else
  return x / denominator * (1.0f / 0.596f);
#endif
}

// Returns silu(x) = x / (1 + e^-x), with the same special cases as `activate`.
SCM_HD float silu(float x) {
  const float denominator = 1.0f + exponential(clamp_exponent(-x));
#ifdef __CUDA_ARCH__
  return __fdividef(x, denominator);
#else
  return x / denominator;
#endif
}

// Returns gelu(x) = x Phi(x), where Phi is the distribution function of the normal distribution. On the CPU, the smaller tail of Phi is e^(-x^2/2) times a
// polynomial in u = 1 / (1 + 0.3 |x|) without a constant term; its relative error is 1.2e-7. For x^2 > 160, where it is below 1e-36, the tail is taken as 0:
// it would soon be denormal.
SCM_HD float gelu(float x) {
#ifdef __CUDA_ARCH__
  return x * normcdff(x);
#else
  const float u = 1.0f / (1.0f + 0.3f * float_of(bits_of(x) & 0x7fffffffu));
  float p = 0.0360888113f;
  p = p * u - 0.158933621f;
  p = p * u + 0.209346211f;
  p = p * u - 0.0564499412f;
  p = p * u + 0.130032542f;
  p = p * u + 0.0994650852f;
  p = p * u + 0.120826312f;
  p = p * u + 0.119624541f;
  const float half_square = 0.5f * x * x;
  const std::uint32_t exponent = bits_of(half_square), limit = bits_of(80.0f);  // as integers, for the reason given at clamp_magnitude
  const float limited_tail = p * u * exponential(-float_of(exponent < limit ? exponent : limit));
  const float tail = float_of(exponent < limit ? bits_of(limited_tail) : 0);
  return x * (x < 0.0f ? tail : 1.0f - tail);
#endif
}

// Returns a * b rounded to float, never fused with an addition, as in the ONNX function bodies. CPU kernels that use it are compiled with -ffp-contract=off.
SCM_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Clamps x to [-bound, bound]. NaN stays NaN, as in torch.clamp.
SCM_HD float clamp(float x, float bound) {
  x = x < -bound ? -bound : x;
  return x > bound ? bound : x;
}

// Clamps x to [0, 255] and rounds to nearest even. NaN gives 0.
SCM_HD std::uint8_t to_uint8(float x) {
  x = x > 0.0f ? x : 0.0f;
  x = x < 255.0f ? x : 255.0f;
  return static_cast<std::uint8_t>(bits_of(x + 12582912.0f) & 0xffu);  // 1.5 * 2^23: the addition rounds
}

// Returns the factor of pixel normalization (EDM2, equation 30): 1 / (eps + |x| / sqrt(channels)).
SCM_HD float inverse_norm(float sum_of_squares, float channels, float eps) {
#ifdef __CUDA_ARCH__
  return 1.0f / (eps + sqrtf(sum_of_squares / channels));
#else
  return 1.0f / (eps + __builtin_sqrtf(sum_of_squares / channels));
#endif
}

}  // namespace SCM_ISA
}  // namespace scm
