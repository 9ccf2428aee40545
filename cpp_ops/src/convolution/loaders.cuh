// The copies from global to shared memory of the convolution: a tile of input pixels and a tile of weights, for kDepth terms of the sums.
//
// In shared memory a row is a pixel, or an output channel, with kDepth terms in 16-byte chunks. Chunk c of row r is stored at position c ^ key(r), where 8 rows
// that follow one another, at any chunk, are in 8 different groups of 4 banks: neither the 8 rows that ldmatrix reads together nor the 8 chunks that 8 threads
// write together conflict. With 64 terms this is the layout that CUDA calls a swizzle of 128 bytes.
#pragma once

#include "common/cuda.h"
#include "convolution/op.h"

namespace scm::convolution {

constexpr int kStep = 64;  // terms; the parts of a split sum end at multiples of it

// The arguments of a kernel. Indices of pixels and tiles have 32 bits, which saves registers.
template <typename T>
struct Launch {
  Params<T> p;
  int width, height, pixels;      // of a sample
  int outputs, out;               // pixels of all samples, and their channels
  int in, in_padded;              // channels
  int terms, steps, split;        // of a sum
  int tiles_m, tiles_n;           // along pixels, along output channels
  int first_tile, tiles;          // of this launch
  bool pixels_first;              // neighboring blocks have neighboring pixels and the same weights, else the opposite
};

// What a block computes at a time: a part of the sums of a tile.
struct Unit {
  int tile, part;                  // the tile of this launch
  int first_pixel, first_channel;  // of the tile
  int first_step, steps;           // of the part

  template <typename T>
  __device__ __forceinline__ Unit(const Launch<T>& l, int index, int pixels, int channels) {
    tile = index / l.split;
    part = index - tile * l.split;
    const int inner = l.pixels_first ? l.tiles_m : l.tiles_n, outer_index = (l.first_tile + tile) / inner;
    const int inner_index = l.first_tile + tile - outer_index * inner;
    first_pixel = (l.pixels_first ? inner_index : outer_index) * pixels;
    first_channel = (l.pixels_first ? outer_index : inner_index) * channels;
    first_step = part * l.steps / l.split;
    steps = (part + 1) * l.steps / l.split - first_step;
  }
};

// Shapes of a block: kM pixels by kN output channels, kDepth terms at a time, kStages of them in shared memory.
template <int kM_, int kN_, int kThreads_, int kDepth_, int kStages_>
struct Block {
  static constexpr int kM = kM_, kN = kN_, kThreads = kThreads_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kRowBytes = 2 * kDepth, kChunks = kDepth / 8;
  static constexpr int kStageBytes = (kM + kN) * kRowBytes, kSharedBytes = kStages * kStageBytes;
  static constexpr int kRowsPerPass = kThreads / kChunks;  // rows that the threads copy together, a chunk each
  static_assert(kDepth == 32 || kDepth == 64);
  static_assert(kM % kRowsPerPass == 0 && kN % kRowsPerPass == 0 && kRowsPerPass % 16 == 0);

  static __device__ __forceinline__ int key(int row) { return kDepth == 64 ? row & 7 : row >> 1 & 3; }
};

// Row `row` of a tile of weights in shared memory has the output channel column(row), relative to the tile. In the products of four neighboring 8-column
// matrices a lane then holds 8 neighboring channels: lane t of 4 has the columns 2t and 2t + 1 of each matrix, which are the channels 8t to 8t + 7. For numbers
// without common bits, column(a + b) = column(a) + column(b).
__host__ __device__ constexpr int column(int row) { return (row & ~31) | (row & 1) | (row & 6) << 2 | (row & 24) >> 2; }

// Copies input pixels. A thread copies one chunk of every kRowsPerPass-th row.
template <typename T, typename B, bool kWide>
class InputLoader {
 public:
  __device__ __forceinline__ InputLoader(const Launch<T>& l, int first_pixel, int first_step) : l_(l) {
    const int row = threadIdx.x / B::kChunks, chunk = threadIdx.x % B::kChunks;
    offset_ = row * B::kRowBytes + (chunk ^ B::key(row)) * 16;
    const int pixel = first_pixel + row;
    row_ = l.p.x + std::int64_t{pixel} * l.in;
    const int term = first_step * kStep + chunk * 8;
    tap_ = term / l.in_padded;
    channel_ = term - tap_ * l.in_padded;
#pragma unroll
    for (int i = 0; i < kRows; ++i) taps_[i] = taps_of(pixel + i * B::kRowsPerPass);
  }

  // Starts the copies of the next kDepth terms.
  __device__ __forceinline__ void load(unsigned char* to) {
    std::int64_t offset = channel_;
    if (l_.p.sizes.taps == 9) offset += std::int64_t{(tap_ / 3 - 1) * l_.width + (tap_ % 3 - 1)} * l_.in;
    const T* from = row_ + offset;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy(to + offset_ + i * B::kRowsPerPass * B::kRowBytes, from + i * B::kRowsPerPass * l_.in, taps_[i] >> tap_ & 1);
    }
    channel_ += B::kDepth;
    while (channel_ >= l_.in_padded) {
      channel_ -= l_.in_padded;
      ++tap_;
    }
  }

 private:
  static constexpr int kRows = B::kM / B::kRowsPerPass;

  // Returns a bit for each tap that is inside the map. There are none for pixels past the last one, and none past the last tap.
  __device__ __forceinline__ std::uint32_t taps_of(int pixel) const {
    if (pixel >= l_.outputs) return 0;
    if (l_.p.sizes.taps == 1) return 1;
    const int line = pixel / l_.width, j = pixel - line * l_.width, i = line - line / l_.height * l_.height;
    const std::uint32_t columns = 2u | (j > 0 ? 1u : 0u) | (j + 1 < l_.width ? 4u : 0u);
    return (i > 0 ? columns : 0u) | columns << 3 | (i + 1 < l_.height ? columns << 6 : 0u);
  }

  __device__ __forceinline__ void copy(unsigned char* to, const T* from, bool valid) const {
    if constexpr (kWide) {
      start_copy(to, valid ? from : l_.p.weight, valid);
    } else {
      Vector<T, 8> values = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (valid && channel_ + i < l_.in) values.words[i / 2] |= static_cast<std::uint32_t>(from[i].bits) << (i % 2 * 16);
      }
      *reinterpret_cast<Vector<T, 8>*>(to) = values;
    }
  }

  const Launch<T>& l_;
  const T* row_;  // the thread's first pixel
  int offset_, tap_, channel_;
  std::uint32_t taps_[kRows];
};

// Copies weights, in the same way.
template <typename T, typename B>
class WeightLoader {
 public:
  __device__ __forceinline__ WeightLoader(const Launch<T>& l, int first_channel, int first_step) : l_(l) {
    const int row = threadIdx.x / B::kChunks, chunk = threadIdx.x % B::kChunks;
    offset_ = row * B::kRowBytes + (chunk ^ B::key(row)) * 16;
    term_ = first_step * kStep + chunk * 8;
    const int channel = first_channel + column(row);
    row_ = l.p.weight + std::int64_t{channel} * l.terms;
    channels_ = l.out - channel;
  }

  __device__ __forceinline__ void load(unsigned char* to) {
#pragma unroll
    for (int i = 0; i < B::kN / B::kRowsPerPass; ++i) {
      const bool valid = column(i * B::kRowsPerPass) < channels_ && term_ < l_.terms;
      const T* from = row_ + (column(i * B::kRowsPerPass) * l_.terms + term_);
      start_copy(to + offset_ + i * B::kRowsPerPass * B::kRowBytes, valid ? from : l_.p.weight, valid);
    }
    term_ += B::kDepth;
  }

 private:
  const Launch<T>& l_;
  const T* row_;  // of the thread's first output channel
  int offset_, term_;
  int channels_;  // from the thread's first output channel to the last one of all
};

}  // namespace scm::convolution
