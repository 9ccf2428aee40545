// Where a tile is.
#pragma once

#include "winograd/winograd.h"

namespace scm::winograd {
inline namespace SCM_ISA {

constexpr std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

struct Place {
  std::int64_t sample, row, column;  // of the pixel at its upper left corner
};

inline Place place_of(const Sizes& s, std::int64_t tile) {
  const std::int64_t across = tiles_across(s), of_sample = tiles_down(s) * across;
  return {tile / of_sample, tile % of_sample / across * kTile, tile % across * kTile};
}

}  // namespace SCM_ISA
}  // namespace scm::winograd
