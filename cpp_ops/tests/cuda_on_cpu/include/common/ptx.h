// Replaces src/common/ptx.h, which documents the functions. Implements the tables of the PTX ISA element by element.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

namespace scm {

inline float sqrt_approximate(float x) { return std::sqrt(x); }

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

template <typename T>
std::uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
}

inline unsigned char* dynamic_shared_memory() { return simulator::shared_memory(); }
inline void start_copy(void* to, const void* from, bool valid) { simulator::start_copy(to, from, valid); }
inline void commit_copies() { simulator::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  simulator::wait_for_copies(kPending);
}

template <bool kTransposed>
void load_matrices_of(std::uint32_t (&r)[4], const void* row, int site) {
  struct Lane {
    const std::uint16_t* row;
    std::uint32_t* r;
  };
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) simulator::fail("loads a matrix from an address that is not aligned");
  Lane self{static_cast<const std::uint16_t*>(row), r};
  simulator::warp_instruction(site, &self, [](void* const* lanes) {
    const auto at = [&](int matrix, int i, int j) { return std::uint32_t{static_cast<Lane*>(lanes[matrix * 8 + i])->row[j]}; };
    for (int m = 0; m < 4; ++m) {
      unsigned banks = 0;  // groups of four
      for (int i = 0; i < 8; ++i) banks |= 1u << (reinterpret_cast<std::uintptr_t>(static_cast<Lane*>(lanes[m * 8 + i])->row) / 16 % 8);
      if (banks != 0xffu) ++simulator::bank_conflicts;
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < 4; ++m) {
        static_cast<Lane*>(lanes[lane])->r[m] = kTransposed ? at(m, 2 * t, g) | at(m, 2 * t + 1, g) << 16 : at(m, g, 2 * t) | at(m, g, 2 * t + 1) << 16;
      }
    }
  });
}

inline void load_matrices(std::uint32_t (&r)[4], const void* row, int site = __builtin_LINE()) { load_matrices_of<false>(r, row, site); }
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row, int site = __builtin_LINE()) { load_matrices_of<true>(r, row, site); }

struct MultiplyAdd {
  float* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

// C += A B with A [16, kDepth] and B [kDepth, 8]; fill(g, t, lane, A, B) copies a lane's elements into A and B.
template <int kDepth, typename Fill>
void multiply_add_warp(void* const* lanes, const Fill& fill) {
  double A[16][kDepth], B[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) fill(lane / 4, lane % 4, *static_cast<MultiplyAdd*>(lanes[lane]), A, B);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& c = static_cast<MultiplyAdd*>(lanes[lane])->c[i];
      double sum = c;
      for (int k = 0; k < kDepth; ++k) sum += A[row][k] * B[k][column];
      c = static_cast<float>(sum);
    }
  }
}

template <typename T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, int site = __builtin_LINE()) {
  MultiplyAdd self{c, a, {b0, b1}};
  simulator::warp_instruction(site, &self, [](void* const* lanes) {
    multiply_add_warp<16>(lanes, [](int g, int t, const MultiplyAdd& lane, double(&A)[16][16], double(&B)[16][8]) {
      const auto half = [](std::uint32_t word, int i) { return double{to_float(T{static_cast<std::uint16_t>(word >> (16 * i))})}; };
      for (int i = 0; i < 2; ++i) {
        A[g][2 * t + i] = half(lane.a[0], i);
        A[g + 8][2 * t + i] = half(lane.a[1], i);
        A[g][2 * t + 8 + i] = half(lane.a[2], i);
        A[g + 8][2 * t + 8 + i] = half(lane.a[3], i);
        B[2 * t + i][g] = half(lane.b[0], i);
        B[2 * t + 8 + i][g] = half(lane.b[1], i);
      }
    });
  });
}

inline void multiply_add_tf32(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, int site = __builtin_LINE()) {
  MultiplyAdd self{c, a, {b0, b1}};
  simulator::warp_instruction(site, &self, [](void* const* lanes) {
    multiply_add_warp<8>(lanes, [](int g, int t, const MultiplyAdd& lane, double(&A)[16][8], double(&B)[8][8]) {
      const auto number = [](std::uint32_t bits) {
        if (bits & 0x1fffu) simulator::fail("multiplies a number that is not a TF32 number");
        return double{float_of(bits)};
      };
      A[g][t] = number(lane.a[0]);
      A[g + 8][t] = number(lane.a[1]);
      A[g][t + 4] = number(lane.a[2]);
      A[g + 8][t + 4] = number(lane.a[3]);
      B[t][g] = number(lane.b[0]);
      B[t + 4][g] = number(lane.b[1]);
    });
  });
}

}  // namespace scm
