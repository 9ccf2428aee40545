// Vectors of floats for cpu.cc files: one source for AVX-512, AVX2, SSE2 and NEON. `Vector` is a GCC vector type, so +, -, *, / and comparisons are operators, a
// scalar operand is broadcast, and the compiler fuses a * b + c where the instruction set has FMA (kernel_options in CMakeLists.txt).
//
// The rules of common/kernel.h apply. A partial load or store converts exactly as a full one, so results do not depend on an element's position.
#pragma once

#include <cstdint>

#include "common/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace scm {
inline namespace SCM_ISA {

// kTileRows: rows of the register tile of `multiply_tile`. AVX-512 and NEON have 32 vector registers, AVX2 and SSE2 have 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 8;
#else
constexpr int kLanes = 4, kTileRows = 4;
#endif
constexpr int kTileColumns = 2 * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector broadcast(float x) { return Vector{} + x; }

inline Vector load(const float* x) {
  Vector vector;
  __builtin_memcpy(&vector, x, sizeof vector);
  return vector;
}

inline void store(float* x, Vector vector) { __builtin_memcpy(x, &vector, sizeof vector); }

inline Vector load(const float16* x) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits)));
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(x[i]);
  return load(values);
#endif
}

inline void store(float16* x, Vector vector) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_u16(&x->bits, vreinterpret_u16_f16(vcvt_f16_f32(vector)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = from_float<float16>(vector[i]);
#endif
}

// Loads the first `count` elements and reads no others; the remaining lanes are 0. count is at most kLanes.
template <typename T>
Vector load_part(const T* x, std::int64_t count) {
#if defined(__AVX512F__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == sizeof(float)) {
    return _mm512_maskz_loadu_ps(lanes, x);
  } else {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x));
  }
#else
  T copy[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) copy[i] = x[i];
  return load(copy);
#endif
}

// Stores the first `count` lanes and writes nothing else. count is at most kLanes.
template <typename T>
void store_part(T* x, Vector vector, std::int64_t count) {
#if defined(__AVX512F__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == sizeof(float)) {
    _mm512_mask_storeu_ps(x, lanes, vector);
  } else {
    _mm256_mask_storeu_epi16(x, lanes, _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  T copy[kLanes];
  store(copy, vector);
  for (std::int64_t i = 0; i < count; ++i) x[i] = copy[i];
#endif
}

// Transposes a kLanes x kLanes matrix.
inline void transpose(Vector (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // fours[i + j]: column j of each quarter, rows i to i + 3
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d first = _mm512_castps_pd(pairs[i + j]), second = _mm512_castps_pd(pairs[i + 2 + j]);
      fours[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
      fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 upper_even = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88), upper_odd = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
    const __m512 lower_even = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88), lower_odd = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_f32x4(upper_even, lower_even, 0x88);
    rows[4 + j] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(upper_even, lower_even, 0xdd);
    rows[12 + j] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0xdd);
  }
#elif defined(__AVX__)
  __m256 fours[8];  // fours[4 * half + j]: column j of each half, rows 4 * half to 4 * half + 3
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const Vector* r = rows + 4 * half;
    const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]), c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    fours[4 * half] = _mm256_shuffle_ps(a, c, 0x44);
    fours[4 * half + 1] = _mm256_shuffle_ps(a, c, 0xee);
    fours[4 * half + 2] = _mm256_shuffle_ps(b, d, 0x44);
    fours[4 * half + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20);
    rows[4 + j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
  }
#elif defined(__aarch64__)
  const float32x4x2_t upper = vtrnq_f32(rows[0], rows[1]), lower = vtrnq_f32(rows[2], rows[3]);
  rows[0] = vcombine_f32(vget_low_f32(upper.val[0]), vget_low_f32(lower.val[0]));
  rows[1] = vcombine_f32(vget_low_f32(upper.val[1]), vget_low_f32(lower.val[1]));
  rows[2] = vcombine_f32(vget_high_f32(upper.val[0]), vget_high_f32(lower.val[0]));
  rows[3] = vcombine_f32(vget_high_f32(upper.val[1]), vget_high_f32(lower.val[1]));
#else
  float copy[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) copy[j][i] = rows[i][j];
  }
  for (int i = 0; i < kLanes; ++i) rows[i] = load(copy[i]);
#endif
}

// Computes C[kTileRows, kTileColumns] = A B, or += if kAccumulate. Element (row, k) of A is at A[row * row_stride + k * depth_stride]; b_stride and c_stride are
// the row strides of B and C. The sum of an element is in order of k and depends on nothing else.
template <bool kAccumulate>
inline void multiply_tile(const float* A, std::int64_t row_stride, std::int64_t depth_stride, const float* B, std::int64_t b_stride, float* C,
                          std::int64_t c_stride, std::int64_t depth) {
  Vector sums[kTileRows][2] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    const Vector b0 = load(B + k * b_stride), b1 = load(B + k * b_stride + kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kTileRows; ++row) {
      const float a = A[row * row_stride + k * depth_stride];
      sums[row][0] += a * b0;
      sums[row][1] += a * b1;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kTileRows; ++row) {
    float* c = C + row * c_stride;
    store(c, kAccumulate ? load(c) + sums[row][0] : sums[row][0]);
    store(c + kLanes, kAccumulate ? load(c + kLanes) + sums[row][1] : sums[row][1]);
  }
}

}  // namespace SCM_ISA
}  // namespace scm
