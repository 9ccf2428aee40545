// The products of the convolution with mma instructions, sm_80 and newer.
#pragma once

#include "convolution/epilogue.cuh"

namespace scm::convolution {

// A block of kWarpsM x kWarpsN warps.
template <int kM, int kN, int kWarpsM_, int kWarpsN_, int kDepth, int kStages>
struct MmaBlock : Block<kM, kN, kWarpsM_ * kWarpsN_ * static_cast<int>(kWarp), kDepth, kStages> {
  static constexpr bool kWgmma = false;
  static constexpr int kAhead = kStages - 1;  // stages that are copied in advance: all but the one that is multiplied
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;  // outputs of a warp
  static constexpr int kMatricesM = kWarpM / 16, kMatricesN = kWarpN / 8;

  // The first outputs of the thread's warp, relative to the tile.
  static __device__ __forceinline__ int warp_pixel() { return threadIdx.x / kWarp % kWarpsM * kWarpM; }
  static __device__ __forceinline__ int warp_channel() { return threadIdx.x / kWarp / kWarpsM * kWarpN; }
};

// Adds the products of a tile of input pixels and a tile of weights to the warp's sums.
template <typename T, typename B>
__device__ __forceinline__ void multiply_add_tile(Sums<B::kMatricesM, B::kMatricesN>& sums, const unsigned char* tile) {
  const int lane = threadIdx.x % kWarp;
  const int pixel = B::warp_pixel() + lane % 16, channel = B::warp_channel() + lane / 16 * 8 + lane % 8;
  const unsigned char* pixels = tile + pixel * B::kRowBytes;
  const unsigned char* channels = tile + (B::kM + channel) * B::kRowBytes;
  const int pixel_chunk = lane / 16 ^ B::key(pixel), channel_chunk = (lane / 8 % 2) ^ B::key(channel);
#pragma unroll
  for (int k = 0; k < B::kDepth / 16; ++k) {
    std::uint32_t a[B::kMatricesM][4];
#pragma unroll
    for (int m = 0; m < B::kMatricesM; ++m) load_matrices(a[m], pixels + m * 16 * B::kRowBytes + (pixel_chunk ^ k * 2) * 16);
#pragma unroll
    for (int n = 0; n < B::kMatricesN; n += 2) {
      std::uint32_t b[4];
      load_matrices(b, channels + n * 8 * B::kRowBytes + (channel_chunk ^ k * 2) * 16);
#pragma unroll
      for (int m = 0; m < B::kMatricesM; ++m) {
        multiply_add<T>(sums[m][n], a[m], b[0], b[1]);
        multiply_add<T>(sums[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace scm::convolution
