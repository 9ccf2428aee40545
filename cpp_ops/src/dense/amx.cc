// Dense kernels for AMX. This file is compiled with AMX enabled: it must not call the standard library (see common/kernel.h), and nothing here may be called
// unless isa() is Isa::amx.
#include <immintrin.h>

#include "dense/dense.h"
#include "dense/vectors.h"

namespace scm::dense {
namespace {

// Steps per pass over the pixels. A step is 32 input channels at one tap; the weights of 8 steps, high and low, take 32 KiB and stay in the L1 cache.
constexpr std::int64_t kSteps = 8;

// Operand of LDTILECFG.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// Configures the thread's tile registers for its lifetime: eight tiles of 16 rows of 64 bytes.
class ScopedTiles {
 public:
  ScopedTiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ScopedTiles(const ScopedTiles&) = delete;
  ScopedTiles& operator=(const ScopedTiles&) = delete;
  ~ScopedTiles() { _tile_release(); }
};

// Sums for 32 pixels by 32 output channels in four tiles of 16 by 16: tile 2 * i + j holds half i of the pixels and half j of the channels.
struct alignas(64) Accumulators {
  float tiles[4][256];
};

// Accumulates `steps` steps; step i reads its inputs at offsets[i]. kTall and kWide: also compute the second half of the pixels and of the output channels.
template <bool kTall, bool kWide>
void accumulate(Accumulators& accumulators, const std::uint16_t* high, const std::uint16_t* low, const std::int64_t (&offsets)[kSteps], std::int64_t steps,
                std::int64_t stride, const std::uint16_t* weights, bool from_zero) {
  if (from_zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, accumulators.tiles[0], 64);
    if constexpr (kWide) _tile_loadd(1, accumulators.tiles[1], 64);
    if constexpr (kTall) _tile_loadd(2, accumulators.tiles[2], 64);
    if constexpr (kTall && kWide) _tile_loadd(3, accumulators.tiles[3], 64);
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
    add(high + offsets[i], 16 * stride, row_bytes);
    if (!low) continue;
    add(low + offsets[i], 16 * stride, row_bytes);
    _tile_loadd(6, weights, 64);
    if constexpr (kWide) _tile_loadd(7, weights + kTile, 64);
    weights += 2 * kTile;
    add(high + offsets[i], 16 * stride, row_bytes);
  }
  _tile_stored(0, accumulators.tiles[0], 64);
  if constexpr (kWide) _tile_stored(1, accumulators.tiles[1], 64);
  if constexpr (kTall) _tile_stored(2, accumulators.tiles[2], 64);
  if constexpr (kTall && kWide) _tile_stored(3, accumulators.tiles[3], 64);
}

using Accumulate = void (*)(Accumulators&, const std::uint16_t*, const std::uint16_t*, const std::int64_t (&)[kSteps], std::int64_t, std::int64_t,
                            const std::uint16_t*, bool);

}  // namespace

template <typename T>
void multiply_amx(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end) {
  constexpr Accumulate kVariants[2][2] = {{accumulate<false, false>, accumulate<false, true>}, {accumulate<true, false>, accumulate<true, true>}};
  const Sizes& s = p.sizes;
  const std::int64_t channels = s.padded_in_channels(), steps = s.kernel_size * s.kernel_size * (channels / 32), step_size = (p.low ? 4 : 2) * kTile;
  const std::int64_t pixel_blocks = (end - begin + kBlock - 1) / kBlock;
  const bool wide = s.out_channels - block * kBlock > 16;
  const std::uint16_t* weights = p.weight + block * steps * step_size;
  Accumulators accumulators[kChunk / kBlock];
  const ScopedTiles tiles;
  for (std::int64_t step = 0; step < steps; step += kSteps, weights += kSteps * step_size) {
    const std::int64_t count = steps - step < kSteps ? steps - step : kSteps;
    std::int64_t offsets[kSteps];
    for (std::int64_t i = 0; i < count; ++i) offsets[i] = step_offset(s, step + i);
    for (std::int64_t b = 0; b < pixel_blocks; ++b) {
      const std::int64_t pixel = begin + b * kBlock, at = pixel * channels;
      kVariants[end - pixel > 16][wide](accumulators[b], p.high + at, p.low ? p.low + at : nullptr, offsets, count, channels, weights, step == 0);
    }
  }
  write(p, block, begin, end, [&](std::int64_t i, std::int64_t half) { return &accumulators[i / kBlock].tiles[i % kBlock / 16 * 2 + half][i % 16 * 16]; });
}

template void multiply_amx<float>(const Params<float>&, std::int64_t, std::int64_t, std::int64_t);
template void multiply_amx<float16>(const Params<float16>&, std::int64_t, std::int64_t, std::int64_t);

}  // namespace scm::dense
