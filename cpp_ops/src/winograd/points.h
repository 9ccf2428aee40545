// The matrix products of the convolutions, a few rows by a few vectors of columns at a time, with their sums in registers.
//
// A sum starts from zero or from what C has, and its terms are added one after the other, in the order of the input channels, whatever the numbers of rows and
// columns.
#pragma once

#include "common/simd.h"
#include "winograd/transforms.h"
#include "winograd/weights.h"
#include "winograd/winograd.h"

namespace scm::winograd {
inline namespace SCM_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24, kMaxVectors = 4;  // of 32 registers
#else
constexpr int kSums = 12, kMaxVectors = 2;  // of 16 registers
#endif
constexpr int max_rows(int vectors) { return kSums / vectors < 12 ? kSums / vectors : 12; }

// C [rows, columns] = A [rows, depth] B [depth, columns], or +=.
struct Operands {
  const float* a;       // kStep channels of a row are contiguous, rows follow each other
  std::int64_t a_step;  // from kStep channels to the next
  const float* b;
  float* c;
  std::int64_t stride;  // of the rows of B and C
  std::int64_t depth;
  bool from_zero;
};

template <int kRows, int kVectors>
void multiply_rows(const Operands& p) {
  Vector sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sums[row][i] = p.from_zero ? Vector{} : load(p.c + row * p.stride + i * kLanes);
  }
  const float *a = p.a, *b = p.b;
  const std::int64_t stride = p.stride, next = p.a_step - kStep;
  for (std::int64_t step = 0; step < p.depth; step += kStep, a += next) {
    for (const float* const end = a + (p.depth - step < kStep ? p.depth - step : kStep); a < end; ++a, b += stride) {
      Vector columns[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) columns[i] = load(b + i * kLanes);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sums[row][i] += a[row * kStep] * columns[i];
      }
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(p.c + row * p.stride + i * kLanes, sums[row][i]);
  }
}

template <int kVectors>
void multiply_columns(Operands p, std::int64_t rows) {
  using Multiply = void (*)(const Operands&);
#define SCM_ROWS(count) multiply_rows<count <= max_rows(kVectors) ? count : 1, kVectors>
  constexpr Multiply kVariants[] = {SCM_ROWS(1), SCM_ROWS(2), SCM_ROWS(3), SCM_ROWS(4),  SCM_ROWS(5),  SCM_ROWS(6),
                                    SCM_ROWS(7), SCM_ROWS(8), SCM_ROWS(9), SCM_ROWS(10), SCM_ROWS(11), SCM_ROWS(12)};
#undef SCM_ROWS
  for (std::int64_t parts = (rows + max_rows(kVectors) - 1) / max_rows(kVectors); parts > 0; --parts) {  // of nearly equal size
    const std::int64_t count = (rows + parts - 1) / parts;
    kVariants[count - 1](p);
    p.a += count * kStep;
    p.c += count * p.stride;
    rows -= count;
  }
}

// Multiplies `rows` rows by `vectors` vectors of columns.
inline void multiply_matrix(Operands p, std::int64_t rows, std::int64_t vectors) {
  for (; vectors > 0; vectors -= kMaxVectors, p.b += kMaxVectors * kLanes, p.c += kMaxVectors * kLanes) {
    switch (vectors) {
      case 1:
        multiply_columns<1>(p, rows);
        break;
      case 2:
        multiply_columns<2>(p, rows);
        break;
      case 3:
        multiply_columns<kMaxVectors < 3 ? kMaxVectors : 3>(p, rows);
        break;
      default:
        multiply_columns<kMaxVectors>(p, rows);
    }
  }
}

// -- Few tiles: weights are transformed in registers -------------------------------------------------------------------------

// The products of the points of row kRow, for kTiles tiles and one vector of outputs of a chunk. Point e of a tile is at v + e * v_stride and m + e * m_stride.
template <int kRow, int kTiles, typename T>
void multiply_row_of_points(const float* chunk, std::int64_t inputs, std::int64_t output, const float* v, std::int64_t v_stride, float* m,
                            std::int64_t m_stride, std::int64_t width, bool from_zero, const NextChunk<T>& next) {
  Vector sums[6][kTiles];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) sums[j][tile] = from_zero ? Vector{} : load(m + (kRow * 6 + j) * m_stride + tile * width + output);
  }
  const float* w = chunk + output;
  const float* from = v + kRow * 6 * v_stride;
  for (std::int64_t input = 0; input < inputs; ++input, w += kTaps * width, ++from) {
    if constexpr (kRow == 0) next.prefetch(input, output);
    Vector half[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      half[j] = transformed_weight<kRow>(load(w + j * width), load(w + (3 + j) * width), load(w + (6 + j) * width));
    }
    const auto add = [&](int j, Vector weight) {
#pragma GCC unroll 4
      for (int tile = 0; tile < kTiles; ++tile) sums[j][tile] += from[j * v_stride + tile * kStep] * weight;
    };
    add(0, transformed_weight<0>(half[0], half[1], half[2]));
    add(1, transformed_weight<1>(half[0], half[1], half[2]));
    add(2, transformed_weight<2>(half[0], half[1], half[2]));
    add(3, transformed_weight<3>(half[0], half[1], half[2]));
    add(4, transformed_weight<4>(half[0], half[1], half[2]));
    add(5, transformed_weight<5>(half[0], half[1], half[2]));
  }
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) store(m + (kRow * 6 + j) * m_stride + tile * width + output, sums[j][tile]);
  }
}

template <int kTiles, typename T>
void multiply_points(const float* chunk, std::int64_t inputs, std::int64_t output, const float* v, std::int64_t v_stride, float* m, std::int64_t m_stride,
                     std::int64_t width, bool from_zero, const NextChunk<T>& next) {
  multiply_row_of_points<0, kTiles>(chunk, inputs, output, v, v_stride, m, m_stride, width, from_zero, next);
  multiply_row_of_points<1, kTiles>(chunk, inputs, output, v, v_stride, m, m_stride, width, from_zero, next);
  multiply_row_of_points<2, kTiles>(chunk, inputs, output, v, v_stride, m, m_stride, width, from_zero, next);
  multiply_row_of_points<3, kTiles>(chunk, inputs, output, v, v_stride, m, m_stride, width, from_zero, next);
  multiply_row_of_points<4, kTiles>(chunk, inputs, output, v, v_stride, m, m_stride, width, from_zero, next);
  multiply_row_of_points<5, kTiles>(chunk, inputs, output, v, v_stride, m, m_stride, width, from_zero, next);
}

// Multiplies all points of `tiles` tiles by `width` outputs of a chunk.
template <typename T>
void multiply_few(const float* chunk, std::int64_t inputs, std::int64_t tiles, const float* v, std::int64_t v_stride, float* m, std::int64_t m_stride,
                  std::int64_t width, bool from_zero, const NextChunk<T>& next) {
  constexpr int kMost = kSums / 6;  // tiles at a time: 4, or 2
  for (std::int64_t output = 0; output < width; output += kLanes) {
    for (std::int64_t tile = 0; tile < tiles; tile += kMost) {
      const float* const from = v + tile * kStep;
      float* const to = m + tile * width;
      switch (tiles - tile) {
        case 1:
          multiply_points<1>(chunk, inputs, output, from, v_stride, to, m_stride, width, from_zero, tile == 0 ? next : NextChunk<T>{});
          break;
        case 2:
          multiply_points<2>(chunk, inputs, output, from, v_stride, to, m_stride, width, from_zero, tile == 0 ? next : NextChunk<T>{});
          break;
        case 3:
          multiply_points<kMost < 3 ? kMost : 3>(chunk, inputs, output, from, v_stride, to, m_stride, width, from_zero, tile == 0 ? next : NextChunk<T>{});
          break;
        default:
          multiply_points<kMost>(chunk, inputs, output, from, v_stride, to, m_stride, width, from_zero, tile == 0 ? next : NextChunk<T>{});
      }
    }
  }
}

}  // namespace SCM_ISA
}  // namespace scm::winograd
