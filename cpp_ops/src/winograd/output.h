// The end of the second phase: y = A^T m A for tiles of the output, the bias, the operation that follows, and writing.
#pragma once

#include "mp_sum/op.h"
#include "modulate_silu/op.h"
#include "winograd/tile.h"
#include "winograd/transforms.h"
#include "winograd/weights.h"

namespace scm::winograd {
inline namespace SCM_ISA {

// Output channels [begin, begin + count) of a piece; width is count rounded up to vectors.
struct Outputs {
  std::int64_t begin, count, width;
};

// Computes results of a tile for outputs [begin, end) of a piece of `width` outputs from the tile's points at m + e * stride. Result (pixel, output) goes to
// y[pixel * width + output]. Returns whether all are finite.
inline bool transform_results(const float* m, std::int64_t stride, std::int64_t begin, std::int64_t end, std::int64_t width, float* y) {
  Vector probe = {};  // NaN if a result is not finite
  for (std::int64_t o = begin; o < end; o += kLanes) {
    Vector half[4][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      Vector column[6], transformed[4];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) column[i] = load(m + (i * 6 + j) * stride + o);
      transform_output(column, transformed);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) half[i][j] = transformed[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Vector transformed[4];
      transform_output(half[i], transformed);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        store(y + (i * 4 + j) * width + o, transformed[j]);
        probe += transformed[j] - transformed[j];
      }
    }
  }
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += probe[i];
  return sum == sum;
}

// Computes a tile's results as the sum over taps. Those of a pixel are `stride` floats after those of the previous one. `chunk` holds kChunkSize floats.
template <typename T>
void convolve_directly(const Params<T>& p, const Place& at, const Outputs& outputs, float* chunk, float* y, std::int64_t stride) {
  const Sizes& s = p.sizes;
  const std::int64_t width = outputs.width, pixel_step = p.channels_first ? 1 : s.in, channel_step = p.channels_first ? s.height * s.width : 1;
  const T* const x = p.x + at.sample * s.in * s.height * s.width;
  for (std::int64_t pixel = 0; pixel < kTile * kTile; ++pixel) {
    for (std::int64_t o = 0; o < width; ++o) y[pixel * stride + o] = 0;
  }
  for (std::int64_t input = 0; input < s.in; input += kStep) {
    read_weights(p.weight, s, input, outputs.begin, width, chunk);
    const std::int64_t inputs = min(kStep, s.in - input);
    float pixels[6][6][kStep] = {};
    for (std::int64_t i = 0; i < 6; ++i) {
      for (std::int64_t j = 0; j < 6; ++j) {
        const std::int64_t row = at.row + i - 1, column = at.column + j - 1;
        if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
        for (std::int64_t c = 0; c < inputs; ++c) pixels[i][j][c] = to_float(x[(row * s.width + column) * pixel_step + (input + c) * channel_step]);
      }
    }
    for (std::int64_t i = 0; i < kTile; ++i) {
      for (std::int64_t o = 0; o < width; o += kLanes) {
        Vector sums[kTile];
        for (std::int64_t j = 0; j < kTile; ++j) sums[j] = load(y + (i * kTile + j) * stride + o);
        for (std::int64_t c = 0; c < inputs; ++c) {
          for (std::int64_t tap = 0; tap < kTaps; ++tap) {
            const Vector w = load(chunk + (c * kTaps + tap) * width + o);
            for (std::int64_t j = 0; j < kTile; ++j) sums[j] += pixels[i + tap / 3][j + tap % 3][c] * w;
          }
        }
        for (std::int64_t j = 0; j < kTile; ++j) store(y + (i * kTile + j) * stride + o, sums[j]);
      }
    }
  }
}

// Adds the bias to the results of `tiles` tiles.
template <typename T>
void add_bias(const T* bias, const Outputs& outputs, std::int64_t tiles, float* y) {
  for (std::int64_t o = 0; o < outputs.width; o += kLanes) {
    const Vector addend = load_part(bias + outputs.begin + o, min(kLanes, outputs.count - o));
    for (std::int64_t pixel = 0; pixel < tiles * kTile * kTile; ++pixel) {
      float* const at = y + pixel * outputs.width + o;
      store(at, load(at) + addend);
    }
  }
}

template <typename T>
void write_row(T* to, const float* from, std::int64_t count) {
  for (std::int64_t o = 0; o < count; o += kLanes) {
    if (count - o >= kLanes) {
      store(to + o, load(from + o));
    } else {
      store_part(to + o, load(from + o), count - o);
    }
  }
}

template <typename T>
void write_channels_last(const Params<T>& p, const Place& at, const Outputs& outputs, const float* y) {
  const Sizes& s = p.sizes;
  const std::int64_t rows = min(kTile, s.height - at.row), columns = min(kTile, s.width - at.column);
  T results[kBlock];
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::int64_t pixel = (at.sample * s.height + at.row + i) * s.width + at.column + j, to = pixel * s.out + outputs.begin;
      const float* const from = y + (i * kTile + j) * outputs.width;
      if (p.epilogue == Epilogue::none) {
        write_row(p.y + to, from, outputs.count);
        continue;
      }
      write_row(results, from, outputs.count);
      if (p.epilogue == Epilogue::modulate_silu) {
        const T* const scales = p.scales + at.sample * p.scales_stride + outputs.begin;
        modulate_silu::SCM_CPU<T>({results, scales, p.y + to, 1, 1, outputs.count}, 0, 1);
      } else {
        mp_sum::SCM_CPU<T>({p.skip + to, results, p.y + to, nullptr, outputs.count, p.weight_skip, p.weight_sum, p.clip}, 0, outputs.count);
      }
    }
  }
}

constexpr std::int64_t kTilesOfVector = kLanes / kTile;

// Writes up to kTilesOfVector tiles of one row of tiles.
template <typename T>
void write_channels_first(const Params<T>& p, const Place& at, std::int64_t tiles, const Outputs& outputs, const float* y) {
  const Sizes& s = p.sizes;
  const std::int64_t plane = s.height * s.width, rows = min(kTile, s.height - at.row), columns = min(tiles * kTile, s.width - at.column);
  for (std::int64_t i = 0; i < rows; ++i) {
    T* const to = p.y + (at.sample * s.out + outputs.begin) * plane + (at.row + i) * s.width + at.column;
    for (std::int64_t o = 0; o < outputs.count; o += kLanes) {
      Vector block[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) {
        const std::int64_t tile = k / kTile < tiles ? k / kTile : 0;  // missing tiles: any values
        block[k] = load(y + ((tile * kTile + i) * kTile + k % kTile) * outputs.width + o);
      }
      transpose(block);
      for (int k = 0; k < kLanes && o + k < outputs.count; ++k) store_part(to + (o + k) * plane, block[k], columns);
    }
  }
}

}  // namespace SCM_ISA
}  // namespace scm::winograd
