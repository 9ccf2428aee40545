// The two sources of `choose`: measured shapes and the estimate.
#pragma once

#include <optional>

#include "convolution/op.h"

namespace scm::convolution {

// A measured shape: the fastest tiles for a batch of 1 to 3 samples and for larger ones.
struct Row {
  int capability;
  std::int64_t pixels, in, out;  // pixels of a sample
  int taps, split;
  Shape shape, shape_of_many;
};

// Returns whether a sample has the same bits in every batch with the tiles of the rows.
constexpr bool independent_of_batch(const Row* begin, const Row* end) {
  for (const Row* row = begin; row != end; ++row) {
    if (family(row->shape) != family(row->shape_of_many)) return false;
  }
  return true;
}

// Returns the tile of the row for the sizes. Null if there is none, or the library was built without code for its tiles.
std::optional<Tile> look_up(const Row* begin, const Row* end, const Sizes& sizes, const Device& device);

// Returns the tile with the shortest estimated time.
Tile estimate(const Sizes& sizes, const Device& device);

}  // namespace scm::convolution
