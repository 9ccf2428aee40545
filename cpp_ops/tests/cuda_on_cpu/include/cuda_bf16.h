// Replaces the CUDA Toolkit's cuda_bf16.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline std::uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t below = bits & 0xffff, upper = bits >> 16;
  return {static_cast<std::uint16_t>(upper + (below > 0x8000 || (below == 0x8000 && upper % 2 == 1)))};
}
