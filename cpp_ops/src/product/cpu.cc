// Blocks as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS 34(3), 2008): up to kDepth columns of A are packed into tiles
// of kRows rows, which stay in the L2 cache, and as many rows of B into a panel of kVectors vectors, which stays in the L1 cache and is multiplied by all tiles.
// The first tile's product packs the panel: its loads and stores are hidden behind the arithmetic.
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
constexpr int kWidth = kVectors * kLanes;                        // columns of a panel
constexpr int kStride = (kRows + kLanes - 1) / kLanes * kLanes;  // between the columns of a tile of A

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

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
  float* panel;
  std::int64_t depth;
  float* partial;
  const float* bias;
  bool first, last;
  std::int64_t stride;  // between the rows of B and of C
  const T* b[kVectors];
  Columns<T> columns[kVectors];
};

// kPack: reads B at b[0], b[1], …, and writes the panel for the steps that follow.
template <typename T, bool kPack, int kTile>
void multiply(const Step<T>& step) {
  Vector sums[kTile][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kTile; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[row][v] = step.first ? broadcast(step.bias[row]) : load(step.partial + row * kWidth + v * kLanes);
  }
  if (step.last) {
#pragma GCC unroll 16
    for (int row = 0; row < kTile; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(step.columns[v].c + row * step.stride, 1);
    }
  }
  const float* a = step.tile;
  float* panel = step.panel;
  const T* b[kVectors];
  for (int v = 0; v < kVectors; ++v) b[v] = step.b[v];
  const std::int64_t stride = step.stride;
  for (std::int64_t k = 0; k < step.depth; ++k, a += kStride, panel += kWidth) {
    Vector columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPack) {
        columns[v] = load(b[v]);
        store(panel + v * kLanes, columns[v]);
        b[v] += stride;
      } else {
        columns[v] = load(panel + v * kLanes);
      }
    }
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
      for (int row = 0; row < kTile; ++row) store(c + row * stride, sums[row][v]);
    } else if (count > 0) {
#pragma GCC unroll 16
      for (int row = 0; row < kTile; ++row) store_part(c + row * stride, sums[row][v], count);
    }
  }
}

template <typename T>
using Multiply = void (*)(const Step<T>&);

template <typename T, int... kTiles>
struct Tiles {
  static constexpr Multiply<T> kMultiply[2][1 + sizeof...(kTiles)] = {{nullptr, multiply<T, false, kTiles>...}, {nullptr, multiply<T, true, kTiles>...}};
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

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t per_sample = ceil_div(p.columns, kLanes), row_units = ceil_div(p.rows, p.unit_rows), all_vectors = p.samples * per_sample;
  const std::int64_t max_tiles = ceil_div(p.unit_rows, kRows), max_panels = ceil_div(p.unit_vectors, kVectors);
  // With one tile nothing is read twice: few rows of B at a time are streams that the processor prefetches.
  const std::int64_t steps = ceil_div(p.depth, max_tiles > 1 ? kDepth : kStreams), step_depth = steps > 0 ? ceil_div(p.depth, steps) : 0;
  const std::int64_t tile_size = step_depth * kStride, partial_size = steps > 1 ? kRows * kWidth : 0;
  const std::int64_t scratch_size = step_depth * kWidth + max_tiles * (tile_size + max_panels * partial_size + kRows);
  auto* const scratch = static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>((scratch_size + 15) / 16 * 64)));
  if (!scratch) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  float *const panel = scratch, *const tiles = panel + step_depth * kWidth;
  float *const partials = tiles + max_tiles * tile_size, *const biases = partials + max_tiles * max_panels * partial_size;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t first_row = unit % row_units * p.unit_rows, first_vector = unit / row_units * p.unit_vectors;
    const std::int64_t rows = p.rows - first_row < p.unit_rows ? p.rows - first_row : p.unit_rows;
    const std::int64_t vectors = all_vectors - first_vector < p.unit_vectors ? all_vectors - first_vector : p.unit_vectors;
    const std::int64_t tile_count = ceil_div(rows, kRows);
    const auto top = [&](std::int64_t tile) { return tile * rows / tile_count; };  // tiles of almost the same height
    std::int64_t k = 0;
    do {
      const std::int64_t depth = p.depth - k < step_depth ? p.depth - k : step_depth;
      for (std::int64_t t = 0; t < tile_count; ++t) {
        const int height = static_cast<int>(top(t + 1) - top(t));
        pack_tile(p.a + (first_row + top(t)) * p.depth + k, p.depth, height, depth, tiles + t * tile_size);
        for (int row = 0; row < height; ++row) biases[t * kRows + row] = p.bias ? to_float(p.bias[first_row + top(t) + row]) : 0;
      }
      float* partial = partials;
      for (std::int64_t v = 0; v < vectors; v += kVectors) {
        Step<T> step{nullptr, panel, depth, nullptr, nullptr, k == 0, k + depth == p.depth, p.columns, {}, {}};
        T* c[kVectors];
        bool full = true;
        for (int i = 0; i < kVectors; ++i) {
          const std::int64_t vector = first_vector + v + i, sample = vector / per_sample, column = vector % per_sample * kLanes;
          step.columns[i].count = v + i >= vectors ? 0 : p.columns - column < kLanes ? p.columns - column : kLanes;
          step.b[i] = p.b + (sample * p.depth + k) * p.columns + column;
          c[i] = p.c + (sample * p.rows + first_row) * p.columns + column;
          full &= step.columns[i].count == kLanes;
        }
        if (!full) {
          for (int i = 0; i < kVectors; ++i) pack_columns(step.b[i], p.columns, step.columns[i].count, depth, panel + i * kLanes);
        }
        const bool prefetch = tile_count > 1 && v + kVectors < vectors;
        for (std::int64_t t = 0; t < tile_count; ++t) {
          if (prefetch) {  // a share of the next panel: the processor does not prefetch a few elements of each of many rows
            for (std::int64_t row = t * depth / tile_count; row < (t + 1) * depth / tile_count; ++row) {
              for (int i = 0; i < kVectors; ++i) __builtin_prefetch(step.b[i] + kWidth + row * p.columns, 0, 2);
            }
          }
          for (int i = 0; i < kVectors; ++i) step.columns[i].c = c[i] + top(t) * p.columns;
          step.tile = tiles + t * tile_size;
          step.bias = biases + t * kRows;
          step.partial = partial;
          AllTiles<T>::kMultiply[full && t == 0][top(t + 1) - top(t)](step);
          partial += partial_size;
        }
      }
      k += depth;
    } while (k < p.depth);
  }
  std::free(scratch);
}
SCM_INSTANTIATE_CPU

}  // namespace scm::product
