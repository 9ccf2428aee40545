// Mean and variance on CUDA, accurate if the mean is large: vectors, threads, warps and blocks compute moments of their own elements, which are merged by the
// formula of Chan, Golub and LeVeque (The American Statistician, 1983), equation 2.1.
#pragma once

#include "common/cuda.h"

namespace scm {

// Number of elements, their mean, and the sum of their squared deviations from it.
struct Moments {
  float count, mean, squares;
};

__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count, delta = b.mean - a.mean;
  const float share = count > 0 ? __fdividef(b.count, count) : 0.0f;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * (a.count * share)};
}

template <typename T, int kWidth>
__device__ __forceinline__ Moments moments_of(const Vector<T, kWidth>& x) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += x[i];
  const float mean = sum * (1.0f / kWidth);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {static_cast<float>(kWidth), mean, squares};
}

// Merges the moments of all threads of a block, in a fixed order. All threads must call it together, and get the result.
__device__ __forceinline__ Moments block_moments(Moments m) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Moments of_warps[kWarps];
  for (int distance = 1; distance < static_cast<int>(kWarp); distance *= 2) {
    const float count = __shfl_xor_sync(0xffffffffu, m.count, distance), mean = __shfl_xor_sync(0xffffffffu, m.mean, distance);
    const float squares = __shfl_xor_sync(0xffffffffu, m.squares, distance);
    m = merge(m, {count, mean, squares});
  }
  __syncthreads();  // all threads have read the previous result
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = m;
  __syncthreads();
  Moments all = of_warps[0];
  for (int warp = 1; warp < kWarps; ++warp) all = merge(all, of_warps[warp]);
  return all;
}

}  // namespace scm
