// Replaces src/common/ptx.h, which documents the functions. Implements the tables of the PTX ISA element by element.
#pragma once

#include <cuda_runtime.h>

#include <vector>

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

// C += A B with A [16, kDepth] and B [kDepth, 8]; fill(g, t, lane, A, B) copies a lane's elements into A and B. The tests spend their time here.
template <int kDepth, typename Fill>
__attribute__((no_sanitize("undefined"), optimize("O3"))) void multiply_add_warp(void* const* lanes, const Fill& fill) {
  double A[16][kDepth], B[kDepth][8], C[16][8];
  for (int lane = 0; lane < 32; ++lane) fill(lane / 4, lane % 4, *static_cast<MultiplyAdd*>(lanes[lane]), A, B);
  const auto each = [&](const auto& act) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) act(C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2], static_cast<MultiplyAdd*>(lanes[lane])->c[i]);
    }
  };
  each([](double& sum, float c) { sum = c; });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) C[row][column] += A[row][k] * B[k][column];
    }
  }
  each([](double sum, float& c) { c = static_cast<float>(sum); });
}

// to_float from a table.
template <typename T>
double decoded(std::uint16_t bits) {
  static const std::vector<double> values = [] {
    std::vector<double> all;
    for (std::uint32_t i = 0; i < 0x10000; ++i) all.push_back(to_float(T{static_cast<std::uint16_t>(i)}));
    return all;
  }();
  return values[bits];
}

template <typename T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, int site = __builtin_LINE()) {
  MultiplyAdd self{c, a, {b0, b1}};
  simulator::warp_instruction(site, &self, [](void* const* lanes) {
    multiply_add_warp<16>(lanes, [](int g, int t, const MultiplyAdd& lane, double(&A)[16][16], double(&B)[16][8]) {
      const auto half = [](std::uint32_t word, int i) { return decoded<T>(static_cast<std::uint16_t>(word >> (16 * i))); };
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

// -- Hopper's products of matrices in shared memory ---------------------------------------------------------------------------------
//
// A warp multiplies its 16 rows. Products are computed at once, and in reversed order as late as permitted, when the thread waits: the opposite of copies, so
// that a copy into memory that products still read shows.

struct Products {
  float (*c)[4];  // of the lane
  std::uint64_t a, b;
  int columns;
  double (*decode)(std::uint16_t);
};

// What a thread has started, and which fences it has passed.
struct ProductState {
  std::vector<std::vector<Products>> groups;
  std::vector<Products> uncommitted;
  bool sums_published = false;
};

inline ProductState& product_state() {
  static std::vector<ProductState> states(1024);
  return states[threadIdx.x];
}

inline std::uint64_t matrix_descriptor(const void* rows) {
  const auto address = static_cast<std::uint64_t>(static_cast<const unsigned char*>(rows) - simulator::shared_memory());
  return (address & 0x3ffffu) >> 4 | std::uint64_t{1} << 16 | std::uint64_t{64} << 32 | std::uint64_t{1} << 62;
}

inline void publish_shared_memory() { simulator::publish_copies(); }
inline void publish_sums() { product_state().sums_published = true; }

// Reads element (row, k) as the descriptor says: bits 4 to 6 of an address are exchanged by exclusive or with bits 7 to 9.
inline std::uint16_t element_of(std::uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1) simulator::fail("multiplies matrices that do not have the swizzle of 128 bytes");
  const std::uint64_t eight_rows = (descriptor >> 32 & 0x3fffu) << 4;
  const std::uint64_t address = ((descriptor & 0x3fffu) << 4) + static_cast<std::uint64_t>(row / 8) * eight_rows + static_cast<std::uint64_t>(row % 8 * 128 + k * 2);
  std::uint16_t bits;
  std::memcpy(&bits, simulator::shared_memory() + (address ^ (address >> 7 & 7u) << 4), sizeof bits);
  return bits;
}

inline void multiply_warp(void* const* lanes) {
  const Products& first = *static_cast<Products*>(lanes[0]);
  for (int lane = 1; lane < 32; ++lane) {
    const Products& other = *static_cast<Products*>(lanes[lane]);
    if (other.a != first.a || other.b != first.b) simulator::fail("multiplies other matrices than the rest of its warp");
  }
  const int first_row = static_cast<int>(threadIdx.x / 32 % 4) * 16;
  double A[16][16];
  for (int i = 0; i < 256; ++i) A[i / 16][i % 16] = first.decode(element_of(first.a, first_row + i / 16, i % 16));
  for (int column = 0; column < first.columns; ++column) {
    double B[16];
    for (int k = 0; k < 16; ++k) B[k] = first.decode(element_of(first.b, column, k));
    for (int row = 0; row < 16; ++row) {
      float& c = static_cast<Products*>(lanes[row % 8 * 4 + column % 8 / 2])->c[column / 8][row / 8 * 2 + column % 2];
      double sum = c;
      for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k];
      c = static_cast<float>(sum);
    }
  }
}

template <typename T, int kMatrices>
void start_multiply_add(float (&c)[kMatrices][4], std::uint64_t a, std::uint64_t b, int site = __builtin_LINE()) {
  static_assert(kMatrices == 8 || kMatrices == 16);
  if (!product_state().sums_published) simulator::fail("starts products before its sums are published");
  if (!simulator::copies_published()) simulator::fail("starts products before its copies are published");
  Products products{c, a, b, kMatrices * 8, decoded<T>};
  if (simulator::options.reversed) {
    product_state().uncommitted.push_back(products);
  } else {
    simulator::warp_instruction(site, &products, multiply_warp);
  }
}

inline void commit_products() {
  ProductState& state = product_state();
  state.groups.push_back(std::move(state.uncommitted));
  state.uncommitted.clear();
}

template <int kPending>
void wait_for_products(int site = __builtin_LINE()) {
  ProductState& state = product_state();
  for (; state.groups.size() > kPending; state.groups.erase(state.groups.begin())) {
    for (Products& products : state.groups.front()) simulator::warp_instruction(site, &products, multiply_warp);
  }
  if (kPending == 0) state.sums_published = false;
}

}  // namespace scm
