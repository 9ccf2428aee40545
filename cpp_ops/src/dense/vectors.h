// Vector code for the kernels. Everything here has internal linkage, because each kernel file compiles it with its own instruction set options.
#pragma once

#include <immintrin.h>

#include "dense/dense.h"

namespace scm::dense {
namespace {

// Returns the mask of the first `count` lanes.
[[maybe_unused]] __mmask16 first_lanes(std::int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

[[maybe_unused]] __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
[[maybe_unused]] __m512 load(const float16* from, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)); }

[[maybe_unused]] void store(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
[[maybe_unused]] void store(float16* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Transposes a 16 x 16 matrix.
[[maybe_unused]] void transpose(__m512 (&rows)[16]) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // fours[i + j]: column j of each quarter, rows i to i + 3
    for (int j = 0; j < 2; ++j) {
      const __m512d first = _mm512_castps_pd(pairs[i + j]), second = _mm512_castps_pd(pairs[i + 2 + j]);
      fours[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
      fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 upper_even = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88), upper_odd = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
    const __m512 lower_even = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88), lower_odd = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_f32x4(upper_even, lower_even, 0x88);
    rows[4 + j] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(upper_even, lower_even, 0xdd);
    rows[12 + j] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0xdd);
  }
}

// Returns the offset of a step's inputs, 32 input channels at one tap, in elements from the start of the pixel.
[[maybe_unused]] std::int64_t step_offset(const Sizes& s, std::int64_t step) {
  const std::int64_t blocks = s.padded_in_channels() / 32, tap = step / blocks, input = step % blocks * 32;
  return (tap / s.kernel_size * s.row_stride() + tap % s.kernel_size) * s.padded_in_channels() + input;
}

// Writes the sums of output pixels [begin, end) to y, and skips the padding. sums(i, half) points to the 16 sums of pixel begin + i, aligned to 64 bytes.
template <typename T, typename SumsAt>
void write_channels_last(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end, SumsAt sums) {
  const Sizes& s = p.sizes;
  const std::int64_t outputs = s.out_channels - block * kBlock;
  const __mmask16 masks[2] = {first_lanes(outputs), first_lanes(outputs - 16)};
  std::int64_t n = begin / s.sample_stride(), h = begin % s.sample_stride() / s.row_stride(), w = begin % s.row_stride();
  for (std::int64_t pixel = begin; pixel < end; ++pixel) {
    if (w < s.width && h < s.height) {
      T* y = p.y + ((n * s.height + h) * s.width + w) * s.out_channels + block * kBlock;
      store(y, masks[0], _mm512_load_ps(sums(pixel - begin, 0)));
      if (masks[1]) store(y + 16, masks[1], _mm512_load_ps(sums(pixel - begin, 1)));
    }
    if (++w == s.row_stride()) {
      w = 0;
      if (++h == s.height + s.pad()) {
        h = 0;
        ++n;
      }
    }
  }
}

// Same as write_channels_last for channels first, and adds the bias. Takes 16 pixels at a time; those of one sample are contiguous in y.
template <typename T, typename SumsAt>
void write_channels_first(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end, SumsAt sums) {
  struct PixelRun {
    T* to;
    __mmask16 lanes;
  };
  const Sizes& s = p.sizes;
  const std::int64_t plane = s.height * s.width;
  std::int64_t n = begin / s.sample_stride(), h = begin % s.sample_stride() / s.row_stride(), w = begin % s.row_stride();
  for (std::int64_t pixel = begin; pixel < end; pixel += 16) {
    const std::int64_t count = end - pixel < 16 ? end - pixel : 16;
    PixelRun runs[16];
    int run_count = 0;
    for (std::int64_t lane = 0; lane < count;) {
      T* const to = p.y + (n * s.out_channels + block * kBlock) * plane + h * s.width + w;  // address of the next pixel that is not padding
      __mmask16 lanes = 0;
      for (bool same = true; same && lane < count; ++lane) {
        if (w < s.width && h < s.height) lanes = static_cast<__mmask16>(lanes | 1u << lane);
        if (++w < s.row_stride()) continue;
        w = 0;
        if (++h < s.height + s.pad()) continue;
        h = 0;
        ++n;
        same = false;
      }
      if (lanes) runs[run_count++] = {to, lanes};
    }
    for (std::int64_t half = 0; half < 2; ++half) {
      const std::int64_t outputs = s.out_channels - block * kBlock - 16 * half;
      if (outputs <= 0) break;
      __m512 columns[16];
      for (std::int64_t i = 0; i < 16; ++i) columns[i] = i < count ? _mm512_load_ps(sums(pixel - begin + i, half)) : _mm512_setzero_ps();
      const __m512 bias = load(p.bias + block * kBlock + 16 * half, first_lanes(outputs));
      for (__m512& column : columns) column = _mm512_add_ps(column, bias);
      transpose(columns);
      for (std::int64_t output = 0; output < 16 && output < outputs; ++output) {
        for (int i = 0; i < run_count; ++i) {
          T* const to = runs[i].to + (16 * half + output) * plane;
          store(to, first_lanes(__builtin_popcount(runs[i].lanes)), _mm512_maskz_compress_ps(runs[i].lanes, columns[output]));
        }
      }
    }
  }
}

template <typename T, typename SumsAt>
void write(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end, SumsAt sums) {
  if (p.channels_first) {
    write_channels_first(p, block, begin, end, sums);
  } else {
    write_channels_last(p, block, begin, end, sums);
  }
}

}  // namespace
}  // namespace scm::dense
