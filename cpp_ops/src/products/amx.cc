// Compiled for AMX alone: nothing of the standard library may be called, and nothing here before units() has said so.
#include <immintrin.h>

#include "products/product.h"
#include "products/vectors.h"

namespace scm::products {
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

}  // namespace

template <typename T>
void multiply_tiles(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end) {
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
    for (std::int64_t i = 0; i < count; ++i) offsets[i] = step_offset(s, step + i);
    for (std::int64_t b = 0; b < position_blocks; ++b) {
      const std::int64_t position = begin + b * kBlock, at = position * channels;
      kVariants[end - position > 16][wide](sums[b], p.high + at, p.low ? p.low + at : nullptr, offsets, count, channels, weights, step == 0);
    }
  }
  write(p, block, begin, end, [&](std::int64_t i, std::int64_t half) { return &sums[i / kBlock].tiles[i % kBlock / 16 * 2 + half][i % 16 * 16]; });
}

template void multiply_tiles<float>(const Params<float>&, std::int64_t, std::int64_t, std::int64_t);
template void multiply_tiles<float16>(const Params<float16>&, std::int64_t, std::int64_t, std::int64_t);

}  // namespace scm::products
