// Sizes of the tiles, for the kernels and for their choice.
#pragma once

#include "convolution/op.h"

namespace scm::convolution {

struct TileSize {
  int pixels, channels;
};

constexpr TileSize size_of(Shape shape) {
  switch (shape) {
    case Shape::wgmma_256x128:
      return {256, 128};
    case Shape::mma_128x128:
    case Shape::wgmma_128x128:
      return {128, 128};
    case Shape::mma_128x64:
    case Shape::wgmma_128x64:
      return {128, 64};
    case Shape::mma_64x64:
    case Shape::wgmma_64x64:
      return {64, 64};
    case Shape::mma_64x32:
      return {64, 32};
  }
  return {};
}

// Only this shape has kernels for channels that are no multiples of 8, and for pointers that are not aligned.
constexpr Shape kNarrowShape = Shape::mma_64x32;

inline bool wide(const Sizes& s) { return s.in % 8 == 0 && s.out % 8 == 0; }

// Steps of 64 terms of a sum.
inline std::int64_t steps(const Sizes& s) { return (s.taps * padded(s.in) + 63) / 64; }

inline int effective_split(const Sizes& s, const Tile& tile) { return tile.split < steps(s) ? tile.split : static_cast<int>(steps(s)); }

inline std::int64_t tiles(const Sizes& s, Shape shape) {
  const auto [pixels, channels] = size_of(shape);
  return ((s.samples * s.pixels() + pixels - 1) / pixels) * ((s.out + channels - 1) / channels);
}

}  // namespace scm::convolution
