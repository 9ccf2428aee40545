// Dense kernels for AVX512-BF16. This file is compiled with AVX-512 enabled: it must not call the standard library (see common/kernel.h), and nothing here may
// be called if isa() is Isa::none.
#include <immintrin.h>

#include "dense/dense.h"
#include "dense/vectors.h"

namespace scm::dense {
namespace {

constexpr std::int64_t kSteps = 8;    // steps per pass over the pixels: 32 input channels at one tap each; the weights of all take 16 KiB
constexpr std::int64_t kPixels = 12;  // per iteration: with 32 output channels their sums take 24 of 32 registers
constexpr std::int64_t kMaxSums = (kChunk + kPixels) * kBlock;

// Accumulates `steps` steps into the sums of kRows pixels, 32 per pixel; step i reads its inputs at offsets[i]. kWide: also compute the second half of the
// output channels.
template <int kRows, bool kWide>
void accumulate(float* sums, const std::uint16_t* x, const std::int64_t (&offsets)[kSteps], std::int64_t steps, std::int64_t stride,
                const std::uint16_t* weights, bool from_zero) {
  __m512 sum[kRows][2];
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < (kWide ? 2 : 1); ++half) sum[row][half] = from_zero ? _mm512_setzero_ps() : _mm512_load_ps(sums + row * kBlock + half * 16);
  }
  for (std::int64_t i = 0; i < steps; ++i, weights += 2 * kTile) {
    const std::uint16_t* from = x + offsets[i];
    for (std::int64_t pair = 0; pair < 32; pair += 2) {
      const __m512bh first_half = reinterpret_cast<__m512bh>(_mm512_load_si512(weights + pair * 16));
      const __m512bh second_half = kWide ? reinterpret_cast<__m512bh>(_mm512_load_si512(weights + kTile + pair * 16)) : first_half;
      for (int row = 0; row < kRows; ++row) {
        const auto two = *reinterpret_cast<const int __attribute__((may_alias, aligned(2)))*>(from + row * stride + pair);
        const __m512bh inputs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
        sum[row][0] = _mm512_dpbf16_ps(sum[row][0], inputs, first_half);
        if constexpr (kWide) sum[row][1] = _mm512_dpbf16_ps(sum[row][1], inputs, second_half);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < (kWide ? 2 : 1); ++half) _mm512_store_ps(sums + row * kBlock + half * 16, sum[row][half]);
  }
}

using Accumulate = void (*)(float*, const std::uint16_t*, const std::int64_t (&)[kSteps], std::int64_t, std::int64_t, const std::uint16_t*, bool);

}  // namespace

template <typename T>
void multiply_avx512_bf16(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end) {
  constexpr Accumulate kVariants[3][2] = {
      {accumulate<4, false>, accumulate<4, true>}, {accumulate<8, false>, accumulate<8, true>}, {accumulate<12, false>, accumulate<12, true>}};
  const Sizes& s = p.sizes;
  const std::int64_t channels = s.padded_in_channels(), steps = s.kernel_size * s.kernel_size * (channels / 32);
  const bool wide = s.out_channels - block * kBlock > 16;
  const std::uint16_t* weights = p.weight + block * steps * 2 * kTile;
  alignas(64) float sums[kMaxSums];
  for (std::int64_t step = 0; step < steps; step += kSteps, weights += kSteps * 2 * kTile) {
    const std::int64_t count = steps - step < kSteps ? steps - step : kSteps;
    std::int64_t offsets[kSteps];
    for (std::int64_t i = 0; i < count; ++i) offsets[i] = step_offset(s, step + i);
    for (std::int64_t pixel = begin; pixel < end;) {  // results beyond `end` are discarded
      const std::int64_t fours = end - pixel > 8 ? 3 : end - pixel > 4 ? 2 : 1;
      kVariants[fours - 1][wide](sums + (pixel - begin) * kBlock, p.high + pixel * channels, offsets, count, channels, weights, step == 0);
      pixel += 4 * fours;
    }
  }
  write(p, block, begin, end, [&](std::int64_t i, std::int64_t half) { return sums + i * kBlock + half * 16; });
}

template void multiply_avx512_bf16<float>(const Params<float>&, std::int64_t, std::int64_t, std::int64_t);
template void multiply_avx512_bf16<float16>(const Params<float16>&, std::int64_t, std::int64_t, std::int64_t);

}  // namespace scm::dense
