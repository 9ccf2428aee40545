// 3x3 convolutions and matrix products of channels-last maps on CUDA tensor cores, float16 and bfloat16, with the operation that follows in the same kernel.
//
// y[n, i, j, o] = epilogue(sum over taps and c of x[n, i + di, j + dj, c] * weight[o, tap, c]), with zero padding, accumulated in float32, rounded once.
// A matrix product is the case of one tap. Its rows are the pixels.
//
// The order of the terms of a sum is fixed: tap by tap, 16 channels at a time, in `split` parts whose limits depend only on the number of terms; the parts are
// added in their order. It does not depend on the tile, on the number of samples or on a sample's position. So all tiles of a family (mma or wgmma) give the
// same bits for the same split, and `choose` takes the family and the split from the sizes of one sample only.
//
// y may be `skip`. y must not overlap x.
#pragma once

#include "common/kernel.h"

namespace scm::convolution {

struct Sizes {
  std::int64_t samples, height, width, in, out;
  int taps;  // 9: a 3x3 convolution; 1: a matrix product

  std::int64_t pixels() const { return height * width; }  // of a sample
};

// -- Weights -----------------------------------------------------------------------------------------------------------------

// The packed layout is [out, taps, in padded to a multiple of 8], with zeros in the padding.
constexpr std::int64_t padded(std::int64_t channels) { return (channels + 7) / 8 * 8; }

// Number of elements of the packed weights.
inline std::int64_t packed_size(const Sizes& s) { return s.out * s.taps * padded(s.in); }

// Packs weights on the device: [out, in, 3, 3] for 9 taps, [in, out] for 1 tap. `packed` must be aligned to 16 bytes. Returns null, or CUDA's error message.
template <typename T>
const char* pack(const T* weight, const Sizes& sizes, T* packed, void* stream);

// -- Tiles -------------------------------------------------------------------------------------------------------------------

// Output pixels by output channels that a block computes. A block loads (pixels + channels) / (pixels * channels) elements for each multiply-add, so large tiles
// need less bandwidth of the cache, and small tiles fill the device with small maps.
enum class Shape : int {
  mma_128x128 = 0,
  mma_128x64 = 1,
  mma_64x64 = 2,
  mma_64x32 = 3,
  wgmma_256x128 = 4,
  wgmma_128x128 = 5,
  wgmma_128x64 = 6,
  wgmma_64x64 = 7,
};
constexpr int kShapes = 8;

// The instructions of a shape. All shapes of a family give the same bits for the same split.
enum class Family : int { mma, wgmma };
constexpr Family family(Shape shape) { return shape >= Shape::wgmma_256x128 ? Family::wgmma : Family::mma; }

// `split` blocks share the sum of a tile; 1 to kMaxSplit. A split of more than the number of steps of 64 terms is reduced to that number.
struct Tile {
  Shape shape;
  int split;
};
constexpr int kMaxSplit = 16;

struct Device {
  int capability;       // 10 * major + minor
  int multiprocessors;
};

// Returns whether the device can run the shape, and the library has code for it: wgmma only on compute capability 9.0.
bool supported(Shape shape, const Device& device);

// Looks the sizes up in the table tiles.inc, or else takes the tile with the shortest estimated time. The family and the split depend on the sizes of one
// sample only. Takes some microseconds.
Tile choose(const Sizes& sizes, const Device& device);

// -- Workspace ---------------------------------------------------------------------------------------------------------------

// Bytes for the partial sums of one launch, 0 without a split. The contents before and after do not matter, so it may be a run's scratch memory, aligned to
// 16 bytes.
std::int64_t partials_bytes(const Sizes& sizes, const Tile& tile);

// A launch with a split also needs kCounters counters. They must be zero before the first launch, and each launch leaves them at zero. Launches that may run
// at the same time, that is on different streams, must not share counters: give each stream its own.
constexpr int kCounters = 512;
constexpr std::int64_t kCounterBytes = kCounters * sizeof(std::uint32_t);

// -- Launch ------------------------------------------------------------------------------------------------------------------

enum class Epilogue : int {
  none,           // y = sum
  modulate_silu,  // y = mp_silu(sum * scales[n, o])
  mp_sum,         // y = clamp(skip * weight_skip + sum * weight_sum, -clip, clip)
};

template <typename T>
struct Params {
  const T* x;       // [samples, height, width, in]
  const T* weight;  // packed
  T* y;             // [samples, height, width, out]
  Sizes sizes;
  Epilogue epilogue;
  const T* scales;          // modulate_silu: the scale of sample n and channel o is scales[n * scales_stride + o]
  std::int64_t scales_stride;
  const T* skip;            // mp_sum: [samples, height, width, out]; may be y
  float weight_skip, weight_sum, clip;
  float* partials;          // null without a split
  std::uint32_t* counters;  // null without a split
};

// Launches the kernel; more than one only if a split needs more than kCounters tiles. Does nothing if the output is empty. Pointers that are not aligned to
// 16 bytes and any number of channels are correct, but slower: they run as mma_64x32. Returns null, or CUDA's error message.
template <typename T>
const char* cuda(const Params<T>& p, const Tile& tile, void* stream);

}  // namespace scm::convolution
