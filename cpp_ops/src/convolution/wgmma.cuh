// The products of the convolution with Hopper's wgmma instructions, sm_90a. They read both operands from shared memory and run while the threads start the next
// copies.
#pragma once

#include "convolution/epilogue.cuh"

namespace scm::convolution {

// A block of kM / 64 warpgroups, one below the other.
template <int kM, int kN, int kStages>
struct WgmmaBlock : Block<kM, kN, kM / 64 * 128, 64, kStages> {
  static constexpr bool kWgmma = true;
  static constexpr int kAhead = kStages - 2;  // the products of two stages are unfinished at a time
  static constexpr int kMatricesM = 1, kMatricesN = kN / 8;

  static __device__ __forceinline__ int warp_pixel() { return threadIdx.x / kWarp * 16; }
  static __device__ __forceinline__ int warp_channel() { return 0; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Starts the products of a tile of input pixels and a tile of weights.
template <typename T, typename B>
__device__ __forceinline__ void start_multiply_add_tile(Sums<1, B::kMatricesN>& sums, const unsigned char* tile) {
  const std::uint64_t pixels = matrix_descriptor(tile + threadIdx.x / 128 * 64 * B::kRowBytes), channels = matrix_descriptor(tile + B::kM * B::kRowBytes);
  publish_sums();
#pragma unroll
  for (int k = 0; k < B::kDepth / 16; ++k) start_multiply_add<T>(sums[0], pixels + k * 2, channels + k * 2);  // 32 bytes, in units of 16
  commit_products();
}
#endif

}  // namespace scm::convolution
