// The convolution with mma instructions, sm_80 and newer.
#pragma once

#include "convolution/epilogue.cuh"

namespace scm::convolution {

// Blocks of kWarpsM x kWarpsN warps.
template <int kM, int kN, int kWarpsM_, int kWarpsN_, int kDepth, int kStages>
struct MmaBlock : Block<kM, kN, kWarpsM_ * kWarpsN_ * static_cast<int>(kWarp), kDepth, kStages> {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;  // outputs of a warp
  static constexpr int kMatricesM = kWarpM / 16, kMatricesN = kWarpN / 8;
};

// Adds the products of a tile of input pixels and a tile of weights to the warp's sums.
template <typename T, typename B>
__device__ __forceinline__ void multiply_add_tile(Sums<B::kMatricesM, B::kMatricesN>& sums, const unsigned char* tile) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int pixel = warp % B::kWarpsM * B::kWarpM + lane % 16;
  const int channel = warp / B::kWarpsM * B::kWarpN + lane / 16 * 8 + lane % 8;
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

// kWideIn: input channels are a multiple of 8 and x is aligned. kWideOut: the same of the outputs and of what the epilogue reads.
template <typename T, typename B, bool kWideIn, bool kWideOut>
__global__ void __launch_bounds__(B::kThreads, 2) mma_kernel(const Launch<T> l) {
  unsigned char* const shared = dynamic_shared_memory();
  const int warp = threadIdx.x / kWarp;
  for (int unit = blockIdx.x; unit < l.tiles * l.split; unit += gridDim.x) {
    const int tile = unit / l.split, part = unit - tile * l.split, index = l.first_tile + tile;
    const int inner = l.pixels_first ? l.tiles_m : l.tiles_n, outer_index = index / inner, inner_index = index - outer_index * inner;
    const int first_pixel = (l.pixels_first ? inner_index : outer_index) * B::kM;
    const int first_channel = (l.pixels_first ? outer_index : inner_index) * B::kN;
    const int begin = part * l.steps / l.split, end = (part + 1) * l.steps / l.split;
    const int loads = (end - begin) * (kStep / B::kDepth);

    InputLoader<T, B, kWideIn> input(l, first_pixel, begin);
    WeightLoader<T, B> weight(l, first_channel, begin);
    const auto load = [&](int i) {
      if (i < loads) {
        unsigned char* const to = shared + i % B::kStages * B::kStageBytes;
        input.load(to);
        weight.load(to + B::kM * B::kRowBytes);
      }
      commit_copies();
    };
    Sums<B::kMatricesM, B::kMatricesN> sums = {};
    __syncthreads();  // all threads have read the previous tile
    for (int i = 0; i < B::kStages - 1; ++i) load(i);
    for (int i = 0; i < loads; ++i) {
      wait_for_copies<B::kStages - 2>();
      __syncthreads();  // tile i is there, and all threads have read tile i - 1, whose memory is written next
      load(i + B::kStages - 1);
      multiply_add_tile<T, B>(sums, shared + i % B::kStages * B::kStageBytes);
    }
    wait_for_copies<0>();

    if (l.split > 1 && !add_parts<T, B, B::kMatricesM, B::kMatricesN>(l, tile, part, sums)) continue;
    finish<kWideOut>(l, first_pixel + warp % B::kWarpsM * B::kWarpM, first_channel + warp / B::kWarpsM * B::kWarpN, sums);
  }
}

}  // namespace scm::convolution
