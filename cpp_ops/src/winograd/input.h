// The first phase: V = B^T x B for tiles of the input.
#pragma once

#include "winograd/tile.h"
#include "winograd/transforms.h"

namespace scm::winograd {
inline namespace SCM_ISA {

// Transforms a vector of channels of an input tile, whose pixel (i, j) is pixel(i, j). Point e goes to to[e * stride].
template <typename Pixel>
inline void transform_tile(const Pixel& pixel, std::int64_t stride, float* to) {
  Vector half[6][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    Vector column[6], transformed[6];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) column[i] = pixel(i, j);
    transform_input(column, transformed);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) half[i][j] = transformed[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    Vector transformed[6];
    transform_input(half[i], transformed);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) store(to + (i * 6 + j) * stride, transformed[j] * (kScale[i] * kScale[j]));
  }
}

// Address in V of point 0 of channel c of a tile of the group.
template <typename T>
float* v_at(const Params<T>& p, std::int64_t stride, std::int64_t tile, std::int64_t c) {
  return p.v + c / kStep * kPoints * stride + tile * kStep + c % kStep;
}

template <typename T>
void transform_channels_last(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const Sizes& s = p.sizes;
  const std::int64_t stride = p.plan.group * kStep + kPad;
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const Place at = place_of(s, p.first + tile);
    const T* from[36];
    for (std::int64_t i = 0; i < 6; ++i) {
      for (std::int64_t j = 0; j < 6; ++j) {
        const std::int64_t row = at.row + i - 1, column = at.column + j - 1;
        const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
        from[i * 6 + j] = inside ? p.x + ((at.sample * s.height + row) * s.width + column) * s.in : nullptr;
      }
    }
    for (std::int64_t c = 0; c < s.in; c += kLanes) {
      Vector pixels[36];
      if (s.in - c >= kLanes) {
        for (int i = 0; i < 36; ++i) pixels[i] = from[i] ? load(from[i] + c) : Vector{};
      } else {
        for (int i = 0; i < 36; ++i) pixels[i] = from[i] ? load_part(from[i] + c, s.in - c) : Vector{};
      }
      transform_tile([&](int i, int j) { return pixels[i * 6 + j]; }, stride, v_at(p, stride, tile, c));
    }
  }
}

// Reads the pixels of `tiles` tiles in a row, and kLanes channels from c on, as vectors of channels: pixel (i, j) goes to rows[(i * row_size + j) * kLanes].
template <typename T>
void read_rows(const Params<T>& p, const Place& at, std::int64_t tiles, std::int64_t c, float* rows, std::int64_t row_size) {
  const Sizes& s = p.sizes;
  const std::int64_t plane = s.height * s.width, first = at.column == 0 ? 1 : 0, count = tiles * kTile + 2;  // the pixel before column 0 is padding
  for (std::int64_t i = 0; i < 6; ++i, rows += row_size * kLanes) {
    const std::int64_t row = at.row + i - 1;
    if (first == 1) store(rows, Vector{});
    for (std::int64_t j = first; j < count; j += kLanes) {
      const std::int64_t column = at.column + j - 1, available = row < 0 || row >= s.height || column >= s.width ? 0 : min(kLanes, s.width - column);
      const T* const from = p.x + (at.sample * s.in + c) * plane + row * s.width + column;
      Vector block[kLanes];
      if (available == kLanes && s.in - c >= kLanes) {
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) block[k] = load(from + k * plane);
      } else {
        for (int k = 0; k < kLanes; ++k) block[k] = available > 0 && k < s.in - c ? load_part(from + k * plane, available) : Vector{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) store(rows + (j + k) * kLanes, block[k]);
    }
  }
}

template <typename T>
void transform_channels_first(const Params<T>& p, std::int64_t begin, std::int64_t end, float* rows) {
  const Sizes& s = p.sizes;
  const std::int64_t stride = p.plan.group * kStep + kPad, row_size = tiles_across(s) * kTile + 2 + kLanes;
  for (std::int64_t tile = begin, tiles; tile < end; tile += tiles) {
    const Place at = place_of(s, p.first + tile);
    tiles = min(end - tile, tiles_across(s) - at.column / kTile);
    for (std::int64_t c = 0; c < s.in; c += kLanes) {
      read_rows(p, at, tiles, c, rows, row_size);
      for (std::int64_t k = 0; k < tiles; ++k) {
        const float* const from = rows + k * kTile * kLanes;
        transform_tile([&](int i, int j) { return load(from + (i * row_size + j) * kLanes); }, stride, v_at(p, stride, tile + k, c));
      }
    }
  }
}

// For maps of one pixel (is_pixel), which are the same in both layouts.
template <typename T>
void copy_pixels(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t in = p.sizes.in, stride = p.plan.group * kStep + kPad;
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const T* const from = p.x + (p.first + tile) * in;
    for (std::int64_t c = 0; c < in; c += kLanes) {
      store(v_at(p, stride, tile, c), in - c >= kLanes ? load(from + c) : load_part(from + c, in - c));
    }
  }
}

}  // namespace SCM_ISA
}  // namespace scm::winograd
