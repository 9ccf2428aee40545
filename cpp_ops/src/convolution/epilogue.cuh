// What follows the sums of a convolution: partial sums are added, the epilogue is applied, the result is rounded and stored.
//
// A warp holds kMatricesM by kMatricesN products of 16 pixels by 8 columns, in the layout of mma's operand C (common/ptx.h). The pixels of the products begin
// kMatrixPixels after one another; column() in loaders.cuh has the channels of the columns.
#pragma once

#include "convolution/loaders.cuh"

namespace scm::convolution {

template <int kMatricesM, int kMatricesN>
using Sums = float[kMatricesM][kMatricesN][4];

// Stores the block's partial sums. Returns true in the last block of the tile, whose sums are then the total of all parts, added in their order. The parts are
// in the order of the threads, not of the pixels.
template <typename T, typename B, int kMatricesM, int kMatricesN>
__device__ __forceinline__ bool add_parts(const Launch<T>& l, int tile, int part, Sums<kMatricesM, kMatricesN>& sums) {
  constexpr int kVectors = kMatricesM * kMatricesN;
  static_assert(kVectors * 4 * B::kThreads == B::kM * B::kN);
  using Four = Vector<float, 4>;
  Four* const first = reinterpret_cast<Four*>(l.p.partials) + std::int64_t{tile} * l.split * (kVectors * B::kThreads) + threadIdx.x;
  Four* const own = first + static_cast<std::int64_t>(part) * (kVectors * B::kThreads);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) own[i * B::kThreads] = vector_of<float, 4>([&](int j) { return sums[i / kMatricesN][i % kMatricesN][j]; });

  __threadfence();
  __syncthreads();  // all threads have stored their sums
  const auto parts_before_the_last = static_cast<unsigned>(l.split - 1);
  const bool last = threadIdx.x == 0 && atomicInc(l.p.counters + tile, parts_before_the_last) == parts_before_the_last;  // the counter is then 0 again
  if (!__syncthreads_or(last)) return false;
  __threadfence();
  for (int k = 0; k < l.split; ++k) {
    const Four* const partial = first + static_cast<std::int64_t>(k) * (kVectors * B::kThreads);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const Four values = partial[i * B::kThreads];
      float(&sum)[4] = sums[i / kMatricesN][i % kMatricesN];
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] = k == 0 ? values[j] : sum[j] + values[j];
      if (i % 8 == 7) __syncwarp();  // loads no more in advance: there are no registers for them
    }
  }
  return true;
}

// Applies the epilogue to kWidth sums of neighboring channels and stores them.
template <int kWidth, typename T, typename Sum>
__device__ __forceinline__ void finish(const Launch<T>& l, int sample, int pixel, int channel, const Sum& sum) {
  const Params<T>& p = l.p;
  const std::int64_t at = std::int64_t{pixel} * l.out + channel;
  Vector<T, kWidth> y;
  if (p.epilogue == Epilogue::modulate_silu) {
    const Vector<T, kWidth> scales = load<kWidth>(p.scales + sample * p.scales_stride + channel, 0);
    y = vector_of<T, kWidth>([&](int i) { return activate(sum(i) * scales[i]); });
  } else if (p.epilogue == Epilogue::mp_sum) {
    const Vector<T, kWidth> skip = load<kWidth>(p.skip + at, 0);
    y = vector_of<T, kWidth>([&](int i) { return clamp(skip[i] * p.weight_skip + sum(i) * p.weight_sum, p.clip); });
  } else {
    y = vector_of<T, kWidth>(sum);
  }
  store(p.y + at, 0, y);
}

// Finishes the outputs of a warp. first_pixel and first_channel are the warp's.
template <typename B, bool kWide, typename T>
__device__ __forceinline__ void finish(const Launch<T>& l, int first_pixel, int first_channel, const Sums<B::kMatricesM, B::kMatricesN>& sums) {
  static_assert(B::kMatricesN % 4 == 0);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int row = 0; row < 2 * B::kMatricesM; ++row) {
    const int pixel = first_pixel + row / 2 * B::kMatrixPixels + row % 2 * 8 + g;
    if (pixel >= l.outputs) continue;
    const int sample = l.p.epilogue == Epilogue::modulate_silu ? pixel / l.pixels : 0;
#pragma unroll
    for (int four = 0; four < B::kMatricesN / 4; ++four) {
      const int channel = first_channel + four * 32 + t * 8;
      const auto sum = [&](int i) { return sums[row / 2][four * 4 + i / 2][row % 2 * 2 + i % 2]; };
      if constexpr (kWide) {
        if (channel < l.out) finish<8>(l, sample, pixel, channel, sum);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (channel + i < l.out) finish<1>(l, sample, pixel, channel + i, [&](int) { return sum(i); });
        }
      }
    }
  }
}

}  // namespace scm::convolution
