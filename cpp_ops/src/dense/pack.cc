// Packs weights and converts inputs to bfloat16. This file is compiled with AVX-512 enabled: it must not call the standard library (see common/kernel.h), and
// nothing here may be called if isa() is Isa::none.
#include <immintrin.h>

#include "dense/dense.h"
#include "dense/vectors.h"

namespace scm::dense {
namespace {

// Loads up to 16 values with a stride of less than 2^27, and zeros for the rest.
__m512 load_strided(const float* from, std::int64_t stride, std::int64_t count) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(stride)));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(count), offsets, from, sizeof(float));
}
__m512 load_strided(const float16* from, std::int64_t stride, std::int64_t count) {
  alignas(64) float values[16] = {};
  for (std::int64_t i = 0; i < count && i < 16; ++i) values[i] = _cvtsh_ss(from[i * stride].bits);
  return _mm512_load_ps(values);
}

// The same, faster for consecutive values.
template <typename T>
__m512 load_weights(const T* from, std::int64_t stride, std::int64_t count) {
  return stride == 1 ? load(from, first_lanes(count)) : load_strided(from, stride, count);
}

__m512 to_float32(__m256i bfloats) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16)); }

// Two rows of 16 weights, interleaved into 16 pairs of bfloat16: the rounded values and, if requested, the remainders.
struct InterleavedRows {
  __m512i high, low;
};

InterleavedRows interleave(__m512 even, __m512 odd, bool split_bf16) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  if (!split_bf16) return {_mm512_permutexvar_epi16(order, high), high};
  const __m512 even_rest = _mm512_sub_ps(even, to_float32(_mm512_castsi512_si256(high)));
  const __m512 odd_rest = _mm512_sub_ps(odd, to_float32(_mm512_extracti64x4_epi64(high, 1)));
  const __m512i low = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd_rest, even_rest));
  return {_mm512_permutexvar_epi16(order, high), _mm512_permutexvar_epi16(order, low)};
}

void clear(std::uint16_t* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += 32) _mm512_storeu_si512(to + i, _mm512_setzero_si512());
}

// Stores 16 channels of a pixel as bfloat16, and their remainders if p.low is not null.
template <typename T>
void store_split(const Params<T>& p, std::int64_t at, __m512 value) {
  const __m256i high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.high + at), high);
  if (!p.low) return;
  const __m256bh low = _mm512_cvtneps_pbh(_mm512_sub_ps(value, to_float32(high)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.low + at), reinterpret_cast<__m256i>(low));
}

// Converts row h of sample n, and writes it at `offset`, in elements.
template <typename T>
void split_channels_last(const Params<T>& p, std::int64_t n, std::int64_t h, std::int64_t offset) {
  const Sizes& s = p.sizes;
  const T* x = p.x + (n * s.height + h) * s.width * s.in_channels;
  for (std::int64_t w = 0; w < s.width; ++w, x += s.in_channels, offset += s.padded_in_channels()) {
    for (std::int64_t c = 0; c < s.padded_in_channels(); c += 16) store_split(p, offset + c, load(x + c, first_lanes(s.in_channels - c)));
  }
}

template <typename T>
void split_channels_first(const Params<T>& p, std::int64_t n, std::int64_t h, std::int64_t offset) {
  const Sizes& s = p.sizes;
  const std::int64_t plane = s.height * s.width;
  const T* x = p.x + n * s.in_channels * plane + h * s.width;
  for (std::int64_t w = 0; w < s.width; w += 16) {
    for (std::int64_t c = 0; c < s.padded_in_channels(); c += 16) {
      __m512 rows[16];
      for (std::int64_t i = 0; i < 16; ++i) rows[i] = c + i < s.in_channels ? load(x + (c + i) * plane + w, first_lanes(s.width - w)) : _mm512_setzero_ps();
      transpose(rows);
      for (std::int64_t i = 0; i < 16 && w + i < s.width; ++i) store_split(p, offset + (w + i) * s.padded_in_channels() + c, rows[i]);
    }
  }
}

}  // namespace

template <typename T>
void split(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const Sizes& s = p.sizes;
  const std::int64_t channels = s.padded_in_channels();
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t above = row % (s.height + s.pad()), start = row * s.row_stride() * channels;
    const bool is_zero = above < s.pad() || row >= s.samples * (s.height + s.pad());
    const std::int64_t zeros = is_zero ? s.row_stride() : s.pad();
    clear(p.high + start, zeros * channels);
    if (p.low) clear(p.low + start, zeros * channels);
    if (row + 1 == s.padded_rows()) {  // clear the pixels after the last row
      const std::int64_t rest = start + s.row_stride() * channels;
      clear(p.high + rest, (s.pad() + Sizes::kOverread) * channels);
      if (p.low) clear(p.low + rest, (s.pad() + Sizes::kOverread) * channels);
    }
    if (is_zero) continue;
    (p.channels_first ? split_channels_first<T> : split_channels_last<T>)(p, row / (s.height + s.pad()), above - s.pad(), start + s.pad() * channels);
  }
}

template <typename T>
void pack(const T* weight, const Strides& by, const Sizes& s, bool split_bf16, std::uint16_t* to) {
  const std::int64_t taps = s.kernel_size * s.kernel_size, chunks = s.padded_in_channels() / 32, tiles = (split_bf16 ? 4 : 2) * kTile;
  for (std::int64_t block = 0; block * kBlock < s.out_channels; ++block, to += taps * chunks * tiles) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (std::int64_t tap = 0; tap < taps; ++tap) {  // the weights of a chunk, 36 KB, stay in the L1 cache
        const std::int64_t input = 32 * chunk;
        std::uint16_t* const tile = to + (tap * chunks + chunk) * tiles;
        for (std::int64_t half = 0; half < 2; ++half) {
          const std::int64_t output = block * kBlock + 16 * half;
          const T* from = weight + tap * by.tap + input * by.input + output * by.output;
          for (std::int64_t pair = 0; pair < 16; ++pair) {
            const std::int64_t rows = s.in_channels - input - 2 * pair;
            const __m512 even = load_weights(from + 2 * pair * by.input, by.output, rows > 0 ? s.out_channels - output : 0);
            const __m512 odd = load_weights(from + (2 * pair + 1) * by.input, by.output, rows > 1 ? s.out_channels - output : 0);
            const InterleavedRows packed = interleave(even, odd, split_bf16);
            _mm512_store_si512(tile + half * kTile + pair * 32, packed.high);
            if (split_bf16) _mm512_store_si512(tile + (2 + half) * kTile + pair * 32, packed.low);
          }
        }
      }
    }
  }
}

template void pack<float>(const float*, const Strides&, const Sizes&, bool, std::uint16_t*);
template void pack<float16>(const float16*, const Strides&, const Sizes&, bool, std::uint16_t*);
template void split<float>(const Params<float>&, std::int64_t, std::int64_t);
template void split<float16>(const Params<float16>&, std::int64_t, std::int64_t);

}  // namespace scm::dense
