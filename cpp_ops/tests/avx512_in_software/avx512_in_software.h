// The AVX-512 intrinsics of common/simd.h in plain C++, for processors with AVX2 only. Included before a kernel's source, it makes the kernel believe that it is
// compiled for AVX-512; GCC then splits its vectors of 16 floats in two.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace scm_avx512_in_software {

using Floats = float __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(64)));

inline Floats cvtph_ps(__m256i half) {
  Floats result;
  const __m256 lower = _mm256_cvtph_ps(_mm256_castsi256_si128(half)), upper = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  std::memcpy(&result, &lower, 32);
  std::memcpy(reinterpret_cast<char*>(&result) + 32, &upper, 32);
  return result;
}

inline __m256i cvtps_ph(const Floats& x) {
  __m256 lower, upper;
  std::memcpy(&lower, &x, 32);
  std::memcpy(&upper, reinterpret_cast<const char*>(&x) + 32, 32);
  return _mm256_set_m128i(_mm256_cvtps_ph(upper, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(lower, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats maskz_loadu_ps(std::uint16_t lanes, const void* x) {
  Floats result = {};
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) std::memcpy(reinterpret_cast<char*>(&result) + 4 * i, static_cast<const char*>(x) + 4 * i, 4);
  }
  return result;
}

inline __m256i maskz_loadu_epi16(std::uint16_t lanes, const void* x) {
  __m256i result = {};
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) std::memcpy(reinterpret_cast<char*>(&result) + 2 * i, static_cast<const char*>(x) + 2 * i, 2);
  }
  return result;
}

inline void mask_storeu_ps(void* to, std::uint16_t lanes, const Floats& x) {
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) std::memcpy(static_cast<char*>(to) + 4 * i, reinterpret_cast<const char*>(&x) + 4 * i, 4);
  }
}

inline void mask_storeu_epi16(void* to, std::uint16_t lanes, __m256i x) {
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) std::memcpy(static_cast<char*>(to) + 2 * i, reinterpret_cast<const char*>(&x) + 2 * i, 2);
  }
}

// In each quarter of 128 bits: elements [2 kUpper, 2 kUpper + 2) of a and b in turn.
template <int kUpper>
inline Floats unpack_ps(const Floats& a, const Floats& b) {
  Floats result;
  for (int quarter = 0; quarter < 16; quarter += 4) {
    for (int i = 0; i < 2; ++i) {
      result[quarter + 2 * i] = a[quarter + 2 * kUpper + i];
      result[quarter + 2 * i + 1] = b[quarter + 2 * kUpper + i];
    }
  }
  return result;
}

inline Doubles unpacklo_pd(const Doubles& a, const Doubles& b) { return Doubles{a[0], b[0], a[2], b[2], a[4], b[4], a[6], b[6]}; }
inline Doubles unpackhi_pd(const Doubles& a, const Doubles& b) { return Doubles{a[1], b[1], a[3], b[3], a[5], b[5], a[7], b[7]}; }

// Quarters of 128 bits: two of a, then two of b, chosen by pairs of bits of `order`.
inline Floats shuffle_f32x4(const Floats& a, const Floats& b, int order) {
  Floats result;
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Floats& from = quarter < 2 ? a : b;
    for (int i = 0; i < 4; ++i) result[4 * quarter + i] = from[4 * (order >> 2 * quarter & 3) + i];
  }
  return result;
}

}  // namespace scm_avx512_in_software

#define __m512 scm_avx512_in_software::Floats
#define __m512d scm_avx512_in_software::Doubles
#define __mmask16 std::uint16_t
#define _mm512_cvtph_ps(x) scm_avx512_in_software::cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding) scm_avx512_in_software::cvtps_ph(x)
#define _mm512_maskz_loadu_ps scm_avx512_in_software::maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 scm_avx512_in_software::maskz_loadu_epi16
#define _mm512_mask_storeu_ps scm_avx512_in_software::mask_storeu_ps
#define _mm256_mask_storeu_epi16 scm_avx512_in_software::mask_storeu_epi16
#define _mm512_unpacklo_ps scm_avx512_in_software::unpack_ps<0>
#define _mm512_unpackhi_ps scm_avx512_in_software::unpack_ps<1>
#define _mm512_unpacklo_pd scm_avx512_in_software::unpacklo_pd
#define _mm512_unpackhi_pd scm_avx512_in_software::unpackhi_pd
#define _mm512_castps_pd(x) reinterpret_cast<const scm_avx512_in_software::Doubles&>(x)
#define _mm512_castpd_ps(x) scm_avx512_in_software::Floats(x)
#define _mm512_shuffle_f32x4 scm_avx512_in_software::shuffle_f32x4
#define __AVX512F__ 1
