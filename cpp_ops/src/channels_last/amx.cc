// Compiled for AMX alone: nothing of the standard library may be called, and nothing here before available() has said so.
#include <immintrin.h>

#include "channels_last/product.h"

namespace scm::channels_last {
namespace {

constexpr std::int64_t kSteps = 8;  // at once, of 32 inputs at one place each: their weights, high and low, fill 32 KiB

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// The tile registers of this thread, for as long as it lives.
class Tiles {
 public:
  Tiles() {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = 16;
    }
    _tile_loadconfig(&shapes);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

__mmask16 first(std::int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

__m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
__m512 load(const float16* from, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)); }
float value_of(float x) { return x; }
float value_of(float16 x) { return _cvtsh_ss(x.bits); }

// Up to 16 numbers that lie `stride` apart, and zeros for the rest.
template <typename T>
__m512 load_apart(const T* from, std::int64_t stride, std::int64_t count) {
  if (stride == 1) return load(from, first(count));
  alignas(64) float values[16] = {};
  for (std::int64_t i = 0; i < count && i < 16; ++i) values[i] = value_of(from[i * stride]);
  return _mm512_load_ps(values);
}

void store(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
void store(float16* to, __mmask16 mask, __m512 value) { _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

__m512 widened(__m256i bfloats) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16)); }

// Two rows of weights to 32 pairs, as the units read them: high, and what is left.
struct Pairs {
  __m512i high, low;
};

Pairs pairs(__m512 even, __m512 odd, bool rest) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  if (!rest) return {_mm512_permutexvar_epi16(order, high), high};
  const __m512 even_rest = _mm512_sub_ps(even, widened(_mm512_castsi512_si256(high)));
  const __m512 odd_rest = _mm512_sub_ps(odd, widened(_mm512_extracti64x4_epi64(high, 1)));
  const __m512i low = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd_rest, even_rest));
  return {_mm512_permutexvar_epi16(order, high), _mm512_permutexvar_epi16(order, low)};
}

// Sums of 32 positions and 32 outputs in four tiles: positions 0 to 15 and the first outputs, and the second; positions 16 to 31 likewise.
struct alignas(64) Sums {
  float tiles[4][256];
};

// Adds the products of some steps: `at` says where each of them begins. kTall and kWide: whether the second half of the positions and of the outputs is asked for.
template <bool kTall, bool kWide>
void accumulate(Sums& sums, const std::uint16_t* high, const std::uint16_t* low, const std::int64_t (&at)[kSteps], std::int64_t steps, std::int64_t stride,
                const std::uint16_t* weights, bool from_zero) {
  if (from_zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums.tiles[0], 64);
    if constexpr (kWide) _tile_loadd(1, sums.tiles[1], 64);
    if constexpr (kTall) _tile_loadd(2, sums.tiles[2], 64);
    if constexpr (kTall && kWide) _tile_loadd(3, sums.tiles[3], 64);
  }
  const std::int64_t row_bytes = stride * 2;
  const auto add = [](const std::uint16_t* x, std::int64_t half, std::int64_t row_bytes) {  // tiles 6 and 7 hold the weights
    _tile_loadd(4, x, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTall) {
      _tile_loadd(5, x + half, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kWide) _tile_dpbf16ps(3, 5, 7);
    }
  };
  for (std::int64_t i = 0; i < steps; ++i) {
    _tile_loadd(6, weights, 64);
    if constexpr (kWide) _tile_loadd(7, weights + kTile, 64);
    weights += 2 * kTile;
    add(high + at[i], 16 * stride, row_bytes);
    if (!low) continue;
    add(low + at[i], 16 * stride, row_bytes);
    _tile_loadd(6, weights, 64);
    if constexpr (kWide) _tile_loadd(7, weights + kTile, 64);
    weights += 2 * kTile;
    add(high + at[i], 16 * stride, row_bytes);
  }
  _tile_stored(0, sums.tiles[0], 64);
  if constexpr (kWide) _tile_stored(1, sums.tiles[1], 64);
  if constexpr (kTall) _tile_stored(2, sums.tiles[2], 64);
  if constexpr (kTall && kWide) _tile_stored(3, sums.tiles[3], 64);
}

using Accumulate = void (*)(Sums&, const std::uint16_t*, const std::uint16_t*, const std::int64_t (&)[kSteps], std::int64_t, std::int64_t, const std::uint16_t*,
                            bool);

// Writes the sums of the positions that are pixels, and leaves those between the rows.
template <typename T>
void write(const Params<T>& p, const Sums* sums, std::int64_t block, std::int64_t begin, std::int64_t end) {
  const Sizes& s = p.sizes;
  const std::int64_t outputs = s.outputs - block * kBlock;
  const __mmask16 masks[2] = {first(outputs), first(outputs - 16)};
  std::int64_t n = begin / s.sample(), h = begin % s.sample() / s.row(), w = begin % s.row();
  for (std::int64_t position = begin; position < end; ++position) {
    if (w < s.width && h < s.height) {
      const std::int64_t i = position - begin;
      const auto& tiles = sums[i / kBlock].tiles;
      const std::int64_t upper = i % kBlock / 16 * 2, row = i % 16 * 16;
      T* y = p.y + ((n * s.height + h) * s.width + w) * s.outputs + block * kBlock;
      store(y, masks[0], _mm512_load_ps(&tiles[upper][row]));
      if (masks[1]) store(y + 16, masks[1], _mm512_load_ps(&tiles[upper + 1][row]));
    }
    if (++w == s.row()) {
      w = 0;
      if (++h == s.height + s.pad()) {
        h = 0;
        ++n;
      }
    }
  }
}

void clear(std::uint16_t* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += 32) _mm512_storeu_si512(to + i, _mm512_setzero_si512());
}

}  // namespace

template <typename T>
void split(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const Sizes& s = p.sizes;
  const std::int64_t channels = s.padded_inputs();
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t above = row % (s.height + s.pad()), start = row * s.row() * channels;
    const bool is_zero = above < s.pad() || row >= s.samples * (s.height + s.pad());
    const std::int64_t zeros = is_zero ? s.row() : s.pad();
    clear(p.high + start, zeros * channels);
    if (p.low) clear(p.low + start, zeros * channels);
    if (row + 1 == s.padded_rows()) {  // what follows the last row
      const std::int64_t rest = start + s.row() * channels;
      clear(p.high + rest, (s.pad() + Sizes::kSpare) * channels);
      if (p.low) clear(p.low + rest, (s.pad() + Sizes::kSpare) * channels);
    }
    if (is_zero) continue;
    const T* x = p.x + ((row / (s.height + s.pad())) * s.height + above - s.pad()) * s.width * s.inputs;
    for (std::int64_t w = 0; w < s.width; ++w, x += s.inputs) {
      const std::int64_t slot = start + (s.pad() + w) * channels;
      for (std::int64_t c = 0; c < channels; c += 16) {
        const __m512 value = load(x + c, first(s.inputs - c));
        const __m256i high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.high + slot + c), high);
        if (!p.low) continue;
        const __m256bh low = _mm512_cvtneps_pbh(_mm512_sub_ps(value, widened(high)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.low + slot + c), reinterpret_cast<__m256i>(low));
      }
    }
  }
}

template <typename T>
void pack(const T* weight, const Strides& by, const Sizes& s, bool exact, std::uint16_t* to) {
  for (std::int64_t block = 0; block * kBlock < s.outputs; ++block) {
    for (std::int64_t place = 0; place < s.side * s.side; ++place) {
      for (std::int64_t input = 0; input < s.inputs; input += 32, to += (exact ? 4 : 2) * kTile) {
        for (std::int64_t half = 0; half < 2; ++half) {
          const std::int64_t output = block * kBlock + 16 * half;
          const T* from = weight + place * by.place + input * by.input + output * by.output;
          for (std::int64_t pair = 0; pair < 16; ++pair) {
            const std::int64_t rows = s.inputs - input - 2 * pair;
            const __m512 even = load_apart(from + 2 * pair * by.input, by.output, rows > 0 ? s.outputs - output : 0);
            const __m512 odd = load_apart(from + (2 * pair + 1) * by.input, by.output, rows > 1 ? s.outputs - output : 0);
            const Pairs packed = pairs(even, odd, exact);
            _mm512_store_si512(to + half * kTile + pair * 32, packed.high);
            if (exact) _mm512_store_si512(to + (2 + half) * kTile + pair * 32, packed.low);
          }
        }
      }
    }
  }
}

template <typename T>
void multiply(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end) {
  constexpr Accumulate kVariants[2][2] = {{accumulate<false, false>, accumulate<false, true>}, {accumulate<true, false>, accumulate<true, true>}};
  const Sizes& s = p.sizes;
  const std::int64_t channels = s.padded_inputs(), steps = s.side * s.side * (channels / 32), step_size = (p.low ? 4 : 2) * kTile;
  const std::int64_t position_blocks = (end - begin + kBlock - 1) / kBlock;
  const bool wide = s.outputs - block * kBlock > 16;
  const std::uint16_t* weights = p.weight + block * steps * step_size;
  Sums sums[kChunk / kBlock];
  const Tiles tiles;
  for (std::int64_t step = 0; step < steps; step += kSteps, weights += kSteps * step_size) {
    const std::int64_t count = steps - step < kSteps ? steps - step : kSteps;
    std::int64_t offsets[kSteps];
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t place = (step + i) / (channels / 32), input = (step + i) % (channels / 32) * 32;
      offsets[i] = (place / s.side * s.row() + place % s.side) * channels + input;
    }
    for (std::int64_t b = 0; b < position_blocks; ++b) {
      const std::int64_t position = begin + b * kBlock, at = position * channels;
      kVariants[end - position > 16][wide](sums[b], p.high + at, p.low ? p.low + at : nullptr, offsets, count, channels, weights, step == 0);
    }
  }
  write(p, sums, block, begin, end);
}

template void pack<float>(const float*, const Strides&, const Sizes&, bool, std::uint16_t*);
template void pack<float16>(const float16*, const Strides&, const Sizes&, bool, std::uint16_t*);
template void split<float>(const Params<float>&, std::int64_t, std::int64_t);
template void split<float16>(const Params<float16>&, std::int64_t, std::int64_t);
template void multiply<float>(const Params<float>&, std::int64_t, std::int64_t, std::int64_t);
template void multiply<float16>(const Params<float16>&, std::int64_t, std::int64_t, std::int64_t);

}  // namespace scm::channels_last
