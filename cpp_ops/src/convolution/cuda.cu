// Convolutions and matrix products on tensor cores, as an implicit GEMM: the rows are pixels, the columns output channels, the terms of a sum taps by input
// channels. Blocks copy tiles of the input and of the weights into a ring of stages in shared memory, ahead of the products.
#include "common/cuda.h"
#include "convolution/mma.cuh"
#include "convolution/op.h"
#include "convolution/shapes.h"
#include "convolution/wgmma.cuh"

namespace scm::convolution {
namespace {

using Mma128x128 = MmaBlock<128, 128, 2, 2, 32, 4>;
using Mma128x64 = MmaBlock<128, 64, 2, 2, 64, 3>;
using Mma64x64 = MmaBlock<64, 64, 2, 2, 64, 4>;
using Mma64x32 = MmaBlock<64, 32, 4, 1, 64, 4>;
using Wgmma256x128 = WgmmaBlock<256, 128, 2, 4>;
using Wgmma128x128 = WgmmaBlock<128, 128, 1, 4>;
using Wgmma128x64 = WgmmaBlock<128, 64, 1, 4>;
using Wgmma64x64 = WgmmaBlock<64, 64, 1, 4>;

// kWideIn: the input channels are a multiple of 8 and x is aligned. kWideOut: the same of the outputs and of what the epilogue reads.
template <typename T, typename B, bool kWideIn, bool kWideOut>
__global__ void __launch_bounds__(B::kThreads, B::kBlocks) kernel(const Launch<T> l) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (B::kWgmma) {
    __trap();  // the driver compiled PTX although there is machine code: the launch fails, instead of leaving the output as it was
    return;
  }
#endif
  unsigned char* const shared = dynamic_shared_memory();
  for (int index = blockIdx.x; index < l.tiles * l.split; index += gridDim.x) {
    const Unit unit(l, index, B::kM, B::kN);
    const int loads = unit.steps * (kStep / B::kDepth);
    InputLoader<T, B, kWideIn> input(l, unit.first_pixel, unit.first_step);
    WeightLoader<T, B> weight(l, unit.first_channel, unit.first_step);
    const auto stage = [&](int i) { return shared + i % B::kStages * B::kStageBytes; };
    const auto load = [&](int i) {
      if (i < loads) {
        input.load(stage(i));
        weight.load(stage(i) + B::kM * B::kRowBytes);
      }
      commit_copies();
    };
    Sums<B::kMatricesM, B::kMatricesN> sums = {};
    __syncthreads();  // all threads have read the previous unit's stages
    for (int i = 0; i < B::kAhead; ++i) load(i);
    int i = 0;
    do {
      wait_for_copies<B::kAhead - 1>();
      if constexpr (B::kWgmma) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        publish_shared_memory();
        __syncthreads();  // stage i is there, and the products of stage i - 2, whose memory is written next, are finished in all threads
        start_multiply_add_tile<T, B>(sums, stage(i));
        load(i + B::kAhead);
        wait_for_products<1>();
#endif
      } else {
        __syncthreads();  // stage i is there, and all threads have read stage i - 1, whose memory is written next
        load(i + B::kAhead);
        multiply_add_tile<T, B>(sums, stage(i));
      }
    } while (++i < loads);
    wait_for_copies<0>();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (B::kWgmma) wait_for_products<0>();
#endif
    if (l.split > 1 && !add_parts<T, B, B::kMatricesM, B::kMatricesN>(l, unit.tile, unit.part, sums)) continue;
    finish<B, kWideOut>(l, unit.first_pixel + B::warp_pixel(), unit.first_channel + B::warp_channel(), sums);
  }
}

// -- Weights -----------------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const T* weight, T* packed, std::int64_t in, std::int64_t in_padded, std::int64_t out, int taps) {
  for_each(
      out * taps * in_padded,
      [&](std::int64_t i) {
        const std::int64_t row = quotient(i, in_padded), c = i - row * in_padded, o = quotient(row, taps), tap = row - o * taps;
        if (c >= in) return T{0};
        return taps == 9 ? weight[(o * in + c) * 9 + tap] : weight[c * out + o];
      },
      [&](std::int64_t i, T value) { packed[i] = value; });
}

// -- Launch ------------------------------------------------------------------------------------------------------------------

template <typename B, bool kWideIn, bool kWideOut, typename T>
const char* run(Launch<T> l, void* stream) {
  l.tiles_m = static_cast<int>(ceil_div(l.outputs, B::kM));
  l.tiles_n = static_cast<int>(ceil_div(l.out, B::kN));
  const int tiles = l.tiles_m * l.tiles_n, at_once = l.split > 1 && tiles > kCounters ? kCounters : tiles;
  for (l.first_tile = 0; l.first_tile < tiles; l.first_tile += at_once) {
    l.tiles = tiles - l.first_tile < at_once ? tiles - l.first_tile : at_once;
    const char* error = launch_with_shared(kernel<T, B, kWideIn, kWideOut>, grid_of(l.tiles * l.split, 1), B::kThreads, B::kSharedBytes, stream, l);
    if (error) return error;
  }
  return nullptr;
}

// Returns whether the epilogue may read and write 8 channels at a time.
template <typename T>
bool wide_out(const Params<T>& p) {
  if (p.sizes.out % 8 != 0 || !aligned(16, p.y)) return false;
  if (p.epilogue == Epilogue::modulate_silu) return p.scales_stride % 8 == 0 && aligned(16, p.scales);
  return p.epilogue != Epilogue::mp_sum || aligned(16, p.skip);
}

}  // namespace

template <typename T>
const char* pack(const T* weight, const Sizes& s, T* packed, void* stream) {
  return launch(pack_kernel<T>, grid_of(packed_size(s), kElementsPerBlock), kThreads, stream, weight, packed, s.in, padded(s.in), s.out, s.taps);
}

template <typename T>
const char* cuda(const Params<T>& p, const Tile& tile, void* stream) {
  const Sizes& s = p.sizes;
  const std::int64_t outputs = s.samples * s.pixels(), terms = s.taps * padded(s.in);
  if (outputs == 0) return nullptr;
  // Indices of pixels, tiles and terms, and offsets in a tile, have 32 bits.
  if (outputs >= 1 << 30) return "a convolution takes fewer than 2^30 pixels of all samples";
  if (s.out >= 1 << 20) return "a convolution takes fewer than 2^20 output channels";
  if (terms >= 1 << 23) return "a convolution takes fewer than 2^23 terms, taps by input channels";
  Launch<T> l = {};
  l.p = p;
  l.width = static_cast<int>(s.width);
  l.height = static_cast<int>(s.height);
  l.pixels = static_cast<int>(s.pixels());
  l.outputs = static_cast<int>(outputs);
  l.out = static_cast<int>(s.out);
  l.in = static_cast<int>(s.in);
  l.in_padded = static_cast<int>(padded(s.in));
  l.terms = static_cast<int>(terms);
  l.steps = static_cast<int>(steps(s));
  l.split = effective_split(s, tile);
  l.pixels_first = outputs * s.in < packed_size(s);  // the larger operand is read from memory once, the other one stays in the cache
  const bool wide_in = s.in % 8 == 0 && aligned(16, p.x);
  if (!wide_in) return run<Mma64x32, false, false>(l, stream);
  if (!wide_out(p)) return run<Mma64x32, true, false>(l, stream);
  switch (tile.shape) {
    case Shape::mma_128x128:
      return run<Mma128x128, true, true>(l, stream);
    case Shape::mma_128x64:
      return run<Mma128x64, true, true>(l, stream);
    case Shape::mma_64x64:
      return run<Mma64x64, true, true>(l, stream);
    case Shape::mma_64x32:
      return run<Mma64x32, true, true>(l, stream);
    case Shape::wgmma_256x128:
      return run<Wgmma256x128, true, true>(l, stream);
    case Shape::wgmma_128x128:
      return run<Wgmma128x128, true, true>(l, stream);
    case Shape::wgmma_128x64:
      return run<Wgmma128x64, true, true>(l, stream);
    case Shape::wgmma_64x64:
      return run<Wgmma64x64, true, true>(l, stream);
  }
  return "invalid tile";
}

#define SCM_INSTANTIATE(T)                                              \
  template const char* pack<T>(const T*, const Sizes&, T*, void*);      \
  template const char* cuda<T>(const Params<T>&, const Tile&, void*);
SCM_INSTANTIATE(float16)
SCM_INSTANTIATE(bfloat16)

}  // namespace scm::convolution
