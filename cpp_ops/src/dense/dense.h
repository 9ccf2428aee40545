// Dense layers, i.e. convolutions and matrix products, on the bfloat16 instructions of x86 processors: AMX tiles or AVX512-BF16 dot products.
//
// Both multiply bfloat16 and accumulate in float32. There are two precisions:
//   split_bf16      A float32 is split into two bfloat16, high + low, which keeps 16 of its 24 bits. high * high + high * low + low * high has a relative error
//                   of about 2^-16. AMX only, where three products are still several times as fast as float32.
//   not split_bf16  Plain bfloat16, one product. AVX512-BF16 has twice the rate of float32.
//
// A convolution is an implicit GEMM. The input is copied into a zero-padded, channels-last bfloat16 buffer, in which a kernel tap is a constant offset. The
// kernels step over the taps and over 32 input channels at a time, and compute 32 output channels for each pixel of the padded image.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/kernel.h"

namespace scm::dense {

// y[n, h, w, o] = sum over i, j, c of x[n, h + i - pad, w + j - pad, c] * weight[o, c, i, j], with zero padding. A matrix product is the case samples = 1,
// width = 1, kernel_size = 1, with its rows as height.
struct Sizes {
  std::int64_t samples, height, width, in_channels, out_channels, kernel_size;

  std::int64_t pad() const { return kernel_size / 2; }
  // Strides of the padded buffer, in pixels. Padding is shared: the right padding of a row is the left padding of the next one, and the rows below a sample are
  // the rows above the next one.
  std::int64_t row_stride() const { return width + pad(); }
  std::int64_t sample_stride() const { return (height + pad()) * row_stride(); }
  // Pixels to compute, with the padding between rows and samples, whose results are discarded. Pixel p of the output has tap 0 at pixel p of the buffer.
  std::int64_t output_pixels() const { return samples * sample_stride(); }
  std::int64_t padded_in_channels() const { return (in_channels + 31) / 32 * 32; }
  std::int64_t padded_rows() const { return samples * (height + pad()) + pad(); }
  std::int64_t padded_pixels() const { return padded_rows() * row_stride() + pad() + kOverread; }

  static constexpr std::int64_t kOverread = 64;  // pixels that the last block reads past the end; the results are discarded
};

// Packed weights: for each block of 32 output channels, each tap, and each 32 input channels, two tiles of 16 output channels each, followed with split_bf16 by
// two tiles of the low parts. A tile is 16 pairs of input channels by 16 output channels. Channels are zero-padded to a multiple of 32.
constexpr std::int64_t kTile = 16 * 32;

// Number of bfloat16 values of the packed weights.
inline std::int64_t packed_size(const Sizes& s, bool split_bf16) {
  return (s.out_channels + 31) / 32 * s.kernel_size * s.kernel_size * (s.padded_in_channels() / 32) * (split_bf16 ? 4 : 2) * kTile;
}

// Strides of the unpacked weights, in elements, along taps, input channels and output channels. The layout is [out, in, kernel_size, kernel_size] for
// convolutions and [in, out] for matrix products.
struct Strides {
  std::int64_t tap, input, output;
};

// Packs the weights into `to`, packed_size() bfloat16 values aligned to 64 bytes.
template <typename T>
void pack(const T* weight, const Strides& strides, const Sizes& sizes, bool split_bf16, std::uint16_t* to);

template <typename T>
struct Params {
  const T* x;                   // [samples, height, width, in_channels], or [samples, in_channels, height, width] if channels_first
  const std::uint16_t* weight;  // packed
  const T* bias;                // [out_channels], if channels_first
  T* y;                         // as x, with out_channels
  Sizes sizes;
  bool channels_first;
  std::uint16_t* high;  // [padded_pixels, padded_in_channels], bfloat16
  std::uint16_t* low;   // as high; null without split_bf16
};

constexpr std::int64_t kBlock = 32;   // output channels of a piece of work; pixels in an AMX block
constexpr std::int64_t kChunk = 512;  // maximum number of pixels of a piece of work

// Returns the best instruction set that the processor has and the operating system permits. The first call requests AMX's tile registers from the kernel.
enum class Isa { none, avx512_bf16, amx };
Isa isa();

// Converts rows [begin, end) of padded_rows() from `x` to bfloat16 in `high` and, unless it is null, the remainders in `low`. Writes the padding too.
template <typename T>
void split(const Params<T>& p, std::int64_t begin, std::int64_t end);

// Computes output channels [32 * block, 32 * block + 32) of output pixels [begin, end); begin is a multiple of 32. multiply_avx512_bf16 ignores `low`.
template <typename T>
void multiply_amx(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end);
template <typename T>
void multiply_avx512_bf16(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end);

}  // namespace scm::dense
