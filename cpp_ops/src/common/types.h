// The element types of tensors, on the host and on the device: float, float16, bfloat16. Kernels load them into float, compute, and round once.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SCM_HD __host__ __device__ __forceinline__
#else
#define SCM_HD inline
#endif

// Code compiled for one instruction set must not be merged by the linker with the same inline function compiled for another: each set has its own namespace.
#ifndef SCM_ISA
#define SCM_ISA generic
#endif

namespace scm {

struct float16 {
  std::uint16_t bits;
};

struct bfloat16 {
  std::uint16_t bits;
};

inline namespace SCM_ISA {

SCM_HD std::uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

SCM_HD float float_of(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

SCM_HD float to_float(float x) { return x; }

SCM_HD float to_float(bfloat16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

// Written with integers and selections alone, so that compilers vectorise it for every instruction set.
SCM_HD float to_float(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const float normal = float_of((magnitude << 13) + 0x38000000u);                   // exponent bias 15 to 127
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 5.9604644775390625e-8f;  // 2^-24
  const float finite = magnitude < 0x0400u ? subnormal : normal;
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;                    // infinity, NaN
  return float_of((magnitude >= 0x7c00u ? special : bits_of(finite)) | sign);
#endif
}

template <typename T>
struct Rounded;

template <>
struct Rounded<float> {
  static SCM_HD float from(float x) { return x; }
};

template <>
struct Rounded<bfloat16> {
  static SCM_HD bfloat16 from(float x) {
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  }
};

template <>
struct Rounded<float16> {
  static SCM_HD float16 from(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;  // to nearest even; may carry into infinity
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;                  // the addition rounds to multiples of 2^-24
    std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return {static_cast<std::uint16_t>(result | sign)};
#endif
  }
};

template <typename T>
SCM_HD T from_float(float x) {
  return Rounded<T>::from(x);
}

}  // namespace SCM_ISA
}  // namespace scm
