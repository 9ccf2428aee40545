// Matrix products in float32 on the CPU: C[s] = A B[s] + bias, for each sample s. All matrices are row-major and are read where they are.
//   1x1 convolution of channels-first maps, y[n, o, p] = bias[o] + sum over i of w[o, i] x[n, i, p]:   A = w, B = x, C = y
// Every element of C is one chain of multiply-adds, bias + a[0] b[0] + a[1] b[1] + ..., so it does not depend on the other rows, columns or samples, on the
// blocking or on the number of threads. The calling code is in product/run.h.
#pragma once

#include <cstdint>

#include "common/kernel.h"

namespace scm::product {

// Terms that are added at a time; the sums of the terms before are partial sums.
constexpr std::int64_t kDepth = 192;   // a panel of B and a tile of A fit the L1 cache, with room for the other thread of the core
constexpr std::int64_t kStreams = 32;  // for units of few rows: rows of B that the processor prefetches as streams

template <typename T>
struct Params {
  const T* a;     // [rows, depth]
  const T* b;     // [samples, depth, columns]
  const T* bias;  // [rows], or null
  T* c;           // [samples, rows, columns]
  std::int64_t samples, rows, columns, depth;
  std::int64_t unit_rows, unit_vectors;  // set by `divide`
  bool* out_of_memory;                   // set to true by a thread that cannot allocate its scratch memory
};

// The columns of all samples are divided into vectors of `lanes` columns, of which the last one of a sample may be partial. A unit of work is unit_rows rows of
// unit_vectors vectors; units are numbered along the rows first.
inline std::int64_t vector_lanes() { return cpu_level() == CpuLevel::v4 ? 16 : cpu_level() == CpuLevel::v3 ? 8 : 4; }  // of cpu_kernel()

template <typename T>
std::int64_t vectors(const Params<T>& p, std::int64_t lanes) {
  return p.samples * ((p.columns + lanes - 1) / lanes);
}

template <typename T>
std::int64_t units(const Params<T>& p, std::int64_t lanes) {
  return (p.rows + p.unit_rows - 1) / p.unit_rows * ((vectors(p, lanes) + p.unit_vectors - 1) / p.unit_vectors);
}

SCM_DECLARE_CPU_KERNELS

}  // namespace scm::product
