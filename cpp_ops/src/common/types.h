// Element types of tensors on host and device: float, float16, bfloat16. Kernels load them as float, compute in float, and round once.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SCM_HD __host__ __device__ __forceinline__
#else
#define SCM_HD inline
#endif

// Each instruction set has its own inline namespace: otherwise the linker would merge inline functions compiled for different instruction sets.
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

// Uses only integer operations and selections, so that compilers vectorize it for every instruction set.
SCM_HD float to_float(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const float finite = float_of(magnitude << 13) * 0x1p112f;  // changes the exponent bias from 15 to 127; correct for subnormal numbers too
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity, NaN
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
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
  }
};

template <>
struct Rounded<float16> {
  static SCM_HD float16 from(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    // Adds 2^(e + 13), where e is the exponent of x but at least that of float16's subnormals: the addition then rounds to 11 bits.
    const std::uint32_t twice = bits_of(x) << 1;  // without the sign
    const std::uint32_t exponent = (twice & 0xff000000u) < 0x71000000u ? 0x71000000u : twice & 0xff000000u;
    const float overflowing = float_of(twice >> 1) * 0x1p112f * 0x1p-110f;  // infinity from 2^16 on
    const std::uint32_t rounded = bits_of(float_of((exponent >> 1) + 0x07800000u) + overflowing);
    const std::uint32_t magnitude = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
    return {static_cast<std::uint16_t>((twice > 0xff000000u ? 0x7e00u : magnitude) | ((bits_of(x) >> 16) & 0x8000u))};
#endif
  }
};

template <typename T>
SCM_HD T from_float(float x) {
  return Rounded<T>::from(x);
}

}  // namespace SCM_ISA
}  // namespace scm
