// Products of float32 matrices on tensor cores as three products in TF32 (3xTF32), which keep float32's accuracy.
#pragma once

#include "common/ptx.h"

namespace scm {

// Splits x into a sum of two TF32 numbers, with a relative error of 2^-20.
struct Split {
  std::uint32_t high, low;

  __device__ __forceinline__ explicit Split(float x) : high(bits_of(x) & 0xffffe000u), low(bits_of(x - float_of(high)) & 0xffffe000u) {}
};

struct SplitA {
  std::uint32_t high[4], low[4];

  __device__ __forceinline__ SplitA(float a0, float a1, float a2, float a3) {
    const Split parts[4] = {Split(a0), Split(a1), Split(a2), Split(a3)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = parts[i].high;
      low[i] = parts[i].low;
    }
  }
};

__device__ __forceinline__ void multiply_add_split(float (&c)[4], const SplitA& a, const Split& b0, const Split& b1) {
  multiply_add_tf32(c, a.low, b0.high, b1.high);
  multiply_add_tf32(c, a.high, b0.low, b1.low);
  multiply_add_tf32(c, a.high, b0.high, b1.high);
}

}  // namespace scm
