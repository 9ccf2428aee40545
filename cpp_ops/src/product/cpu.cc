// Blocks as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS 34(3), 2008): kDepth rows of B are packed into panels of
// kVectors vectors, which stay in the L2 cache; kRows rows of A are packed into a tile, which stays in the L1 cache and is multiplied by all panels.
#include "product/product.h"

#include <cstdlib>

#include "common/simd.h"

namespace scm::product {
namespace {

// Sums of kRows x kVectors vectors fit the registers with room for kVectors vectors of B and one element of A.
#if defined(__AVX512F__)
constexpr int kRows = 14, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kRows = 8, kVectors = 3;
#else
constexpr int kRows = 6, kVectors = 2;
#endif
constexpr int kWidth = kVectors * kLanes;                              // columns of a panel
constexpr int kStride = (kRows + kLanes - 1) / kLanes * kLanes;        // between the columns of a tile of A
constexpr std::int64_t kDepth = 256;

// A vector of columns of C: its first column, and how many of its lanes exist.
template <typename T>
struct Columns {
  T* c;
  std::int64_t count;
};

// Multiplies a tile, [depth, kStride], by a panel, [depth, kWidth], on top of `partial`, or of `bias` if `first`. The sums go to `partial`, [kTile, kWidth], or to
// C if `last`.
template <typename T>
struct Step {
  const float* tile;
  const float* panel;
  std::int64_t depth;
  float* partial;
  const float* bias;
  bool first, last;
  Columns<T> columns[kVectors];
  std::int64_t stride;  // between the rows of C
};

template <typename T, int kTile>
void multiply(const Step<T>& step) {
  Vector sums[kTile][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kTile; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[row][v] = step.first ? broadcast(step.bias[row]) : load(step.partial + row * kWidth + v * kLanes);
  }
  const float *a = step.tile, *b = step.panel;
  for (std::int64_t k = 0; k < step.depth; ++k, a += kStride, b += kWidth) {
    Vector columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kTile; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] += a[row] * columns[v];
    }
  }
  if (!step.last) {
#pragma GCC unroll 16
    for (int row = 0; row < kTile; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(step.partial + row * kWidth + v * kLanes, sums[row][v]);
    }
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    T* c = step.columns[v].c;
    const std::int64_t count = step.columns[v].count;
    if (count == kLanes) {
#pragma GCC unroll 16
      for (int row = 0; row < kTile; ++row) store(c + row * step.stride, sums[row][v]);
    } else if (count > 0) {
#pragma GCC unroll 16
      for (int row = 0; row < kTile; ++row) store_part(c + row * step.stride, sums[row][v], count);
    }
  }
}

template <typename T>
using Multiply = void (*)(const Step<T>&);

template <typename T, int... kTiles>
struct Tiles {
  static constexpr Multiply<T> kMultiply[] = {nullptr, multiply<T, kTiles>...};
};
#if defined(__AVX512F__)
template <typename T>
using AllTiles = Tiles<T, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#elif defined(__aarch64__)
template <typename T>
using AllTiles = Tiles<T, 1, 2, 3, 4, 5, 6, 7, 8>;
#else
template <typename T>
using AllTiles = Tiles<T, 1, 2, 3, 4, 5, 6>;
#endif

// Packs rows of A, [count, depth] with row stride `stride`, into a tile, [depth, kStride]. Rows from `count` on are not initialized.
template <typename T>
void pack_tile(const T* a, std::int64_t stride, int count, std::int64_t depth, float* tile) {
  for (std::int64_t k = 0; k < depth; k += kLanes) {
    const std::int64_t some = depth - k < kLanes ? depth - k : kLanes;
    for (int first = 0; first < count; first += kLanes) {
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = first + i >= count ? Vector{} : some == kLanes ? load(a + (first + i) * stride + k) : load_part(a + (first + i) * stride + k, some);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < some) store(tile + (k + i) * kStride + first, rows[i]);
      }
    }
  }
}

// Packs a vector of columns of B, [depth, count] with row stride `stride`, into a panel, [depth, kWidth].
template <typename T>
void pack_columns(const T* b, std::int64_t stride, std::int64_t count, std::int64_t depth, float* panel) {
  if (count == kLanes) {
    for (std::int64_t k = 0; k < depth; ++k) store(panel + k * kWidth, load(b + k * stride));
  } else {
    for (std::int64_t k = 0; k < depth; ++k) store(panel + k * kWidth, load_part(b + k * stride, count));
  }
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t per_sample = ceil_div(p.columns, kLanes), row_units = ceil_div(p.rows, p.unit_rows), all_vectors = p.samples * per_sample;
  const std::int64_t max_panels = ceil_div(p.unit_vectors, kVectors), max_depth = p.depth < kDepth ? p.depth : kDepth;
  const std::int64_t tile_size = max_depth * kStride, panels_size = max_panels * max_depth * kWidth;
  const std::int64_t partial_size = p.depth > kDepth ? (p.unit_rows + kRows) * max_panels * kWidth : 0;
  auto* const scratch = static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>((tile_size + panels_size + partial_size + 15) / 16 * 64)));
  if (!scratch) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  float *const tile = scratch, *const panels = tile + tile_size, *const partials = panels + panels_size;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t first_row = unit % row_units * p.unit_rows, first_vector = unit / row_units * p.unit_vectors;
    const std::int64_t rows = p.rows - first_row < p.unit_rows ? p.rows - first_row : p.unit_rows;
    const std::int64_t vectors = all_vectors - first_vector < p.unit_vectors ? all_vectors - first_vector : p.unit_vectors;
    const std::int64_t tiles = ceil_div(rows, kRows);
    std::int64_t k = 0;
    do {
      const std::int64_t depth = p.depth - k < kDepth ? p.depth - k : kDepth;
      for (std::int64_t v = 0; v < vectors; ++v) {
        const std::int64_t sample = (first_vector + v) / per_sample, column = (first_vector + v) % per_sample * kLanes;
        const std::int64_t count = p.columns - column < kLanes ? p.columns - column : kLanes;
        pack_columns(p.b + (sample * p.depth + k) * p.columns + column, p.columns, count, depth, panels + v / kVectors * depth * kWidth + v % kVectors * kLanes);
      }
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t top = first_row + t * rows / tiles;  // tiles of almost the same height
        const int height = static_cast<int>(first_row + (t + 1) * rows / tiles - top);
        pack_tile(p.a + top * p.depth + k, p.depth, height, depth, tile);
        float bias[kRows] = {};
        if (p.bias) {
          for (int row = 0; row < height; ++row) bias[row] = to_float(p.bias[top + row]);
        }
        Step<T> step{tile, panels, depth, partials + t * kRows * max_panels * kWidth, bias, k == 0, k + depth == p.depth, {}, p.columns};
        for (std::int64_t v = 0; v < vectors; v += kVectors) {
          for (int i = 0; i < kVectors; ++i) {
            const std::int64_t vector = first_vector + v + i, sample = vector / per_sample, column = vector % per_sample * kLanes;
            const std::int64_t count = p.columns - column < kLanes ? p.columns - column : kLanes;
            step.columns[i] = {p.c + (sample * p.rows + top) * p.columns + column, v + i < vectors ? count : 0};
          }
          AllTiles<T>::kMultiply[height](step);
          step.panel += depth * kWidth;
          step.partial += kRows * kWidth;
        }
      }
      k += depth;
    } while (k < p.depth);
  }
  std::free(scratch);
}
SCM_INSTANTIATE_CPU

}  // namespace scm::product
