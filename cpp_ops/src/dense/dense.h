// Convolutions and matrix products, on what an x86 processor has for bfloat16: matrix units (AMX), or dot products in
// AVX-512's vectors.
//
// Both multiply bfloat16 and add in float32. A float32 number is the sum of two bfloat16, high and low, to 16 of its 24 bits: with
// high * high + high * low + low * high a product has a relative error of about 2^-16, and a sum of many less: on matrix units still several times as fast as
// float32. One product alone is bfloat16 arithmetic, for which dot products have twice float32's rate.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/kernel.h"

namespace scm::dense {

// y[n, h, w, o] = sum of x[n, h + i - kernel_size / 2, w + j - kernel_size / 2, c] * weight[o, c, i, j], with zeros round the map. A matrix product is kernel_size 1, height 1.
struct Sizes {
  std::int64_t samples, height, width, in_channels, out_channels, kernel_size;

  std::int64_t pad() const { return kernel_size / 2; }
  // The padded map is flat: the zeros at the right end of a row are those at the left end of the next, those below a sample those above the next.
  std::int64_t row_stride() const { return width + pad(); }
  std::int64_t sample_stride() const { return (height + pad()) * row_stride(); }
  std::int64_t output_pixels() const { return samples * sample_stride(); }
  std::int64_t padded_in_channels() const { return (in_channels + 31) / 32 * 32; }
  std::int64_t padded_rows() const { return samples * (height + pad()) + pad(); }
  std::int64_t padded_pixels() const { return padded_rows() * row_stride() + pad() + kOverread; }

  static constexpr std::int64_t kOverread = 64;  // read with the last block of rows, and not used
};

// Weights as the units read them: for each 32 outputs, each tap in the window and each 32 inputs two tiles, of 16 outputs each, and two more of what
// bfloat16 leaves of them. A tile is 16 pairs of inputs by 16 outputs. What is missing to 32 is zeros.
constexpr std::int64_t kTile = 16 * 32;

inline std::int64_t packed_size(const Sizes& s, bool split_bf16) {
  return (s.out_channels + 31) / 32 * s.kernel_size * s.kernel_size * (s.padded_in_channels() / 32) * (split_bf16 ? 4 : 2) * kTile;
}

// How far apart the weights of neighbouring taps, inputs and outputs lie, in elements: [outputs, inputs, kernel_size, kernel_size] or [inputs, outputs].
struct Strides {
  std::int64_t tap, input, output;
};

// `to` has packed_size() bfloat16 numbers, aligned to 64 bytes.
template <typename T>
void pack(const T* weight, const Strides& strides, const Sizes& sizes, bool split_bf16, std::uint16_t* to);

template <typename T>
struct Params {
  const T* x;                   // [samples, height, width, inputs]; of planes [samples, inputs, height, width]
  const std::uint16_t* weight;  // packed
  const T* bias;                // [outputs]; of planes alone
  T* y;                         // as x, with outputs
  Sizes sizes;
  bool channels_first;          // whether channels come first
  std::uint16_t* high;  // [slots, padded_in_channels], bfloat16
  std::uint16_t* low;   // the same; null for one product
};

constexpr std::int64_t kBlock = 32;   // outputs, and pixels, that a piece of work computes at once
constexpr std::int64_t kChunk = 512;  // pixels of a piece of work, at most

// What this processor has and the system lets the process use; asks the system, the first time.
enum class Isa { none, avx512_bf16, amx };
Isa isa();

// Splits rows [begin, end) of padded_rows() into `high` and `low`.
template <typename T>
void split(const Params<T>& p, std::int64_t begin, std::int64_t end);

// Computes outputs [32 * block, 32 * block + 32) of pixels [begin, end); begin is a multiple of 32. Dot products do without `low`.
template <typename T>
void multiply_amx(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end);
template <typename T>
void multiply_avx512_bf16(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end);

}  // namespace scm::dense
