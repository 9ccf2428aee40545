// The products of the convolution with Hopper's wgmma instructions, sm_90a. They read both operands from shared memory and run while the threads start the next
// copies.
#pragma once

#include "convolution/epilogue.cuh"

namespace scm::convolution {

// A block of warpgroups, one below the other. Each computes kProducts products of 64 pixels by kN channels, also one below the other.
template <int kM, int kN, int kProducts, int kStages>
struct WgmmaBlock : Block<kM, kN, kM / (64 * kProducts) * 128, 64, kStages> {
  static constexpr bool kWgmma = true;
  static constexpr int kAhead = kStages - 2;  // the products of two stages are unfinished at a time
  static constexpr int kMatricesM = kProducts, kMatricesN = kN / 8;
  static constexpr int kMatrixPixels = 64;  // from a matrix of a warp to the next one below

  static __device__ __forceinline__ int warp_pixel() { return warpgroup_pixel() + threadIdx.x / kWarp % 4 * 16; }
  static __device__ __forceinline__ int warp_channel() { return 0; }
  static __device__ __forceinline__ int warpgroup_pixel() { return threadIdx.x / 128 * (64 * kProducts); }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Starts the products of a tile of input pixels and a tile of weights.
template <typename T, typename B>
__device__ __forceinline__ void start_multiply_add_tile(Sums<B::kMatricesM, B::kMatricesN>& sums, const unsigned char* tile) {
  const std::uint64_t pixels = matrix_descriptor(tile + B::warpgroup_pixel() * B::kRowBytes), channels = matrix_descriptor(tile + B::kM * B::kRowBytes);
  publish_sums();
#pragma unroll
  for (int k = 0; k < B::kDepth / 16; ++k) {
#pragma unroll
    for (int m = 0; m < B::kMatricesM; ++m) {
      start_multiply_add<T>(sums[m], pixels + (m * B::kMatrixPixels * B::kRowBytes + k * 32) / 16, channels + k * 32 / 16);  // addresses in units of 16 bytes
    }
  }
  commit_products();
}
#endif

}  // namespace scm::convolution
