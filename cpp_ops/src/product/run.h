// Runs a matrix product (product/product.h) on the threads of a session.
#pragma once

#include <algorithm>
#include <new>

#include "common/ort.h"
#include "product/product.h"

namespace scm::product {

// Chooses the units of work. A unit packs its part of A once, so it should have many columns; its packed part of A and its partial sums should fit the L2 cache.
template <typename T>
void divide(Params<T>& p, std::int64_t threads) {
  constexpr std::int64_t kMaxElements = 28672;  // of A that are packed at a time
  constexpr std::int64_t kMaxVectors = 64;      // if there may be partial sums
  constexpr double kMinWork = 1 << 17;          // multiply-adds of a unit that make up for waking a thread
  const std::int64_t lanes = vector_lanes(), pieces = threads > 1 ? 4 * threads : 1;
  const std::int64_t blocks = std::max<std::int64_t>((p.rows * std::min(p.depth, kDepth) + kMaxElements - 1) / kMaxElements, 1);
  p.unit_rows = (p.rows + blocks - 1) / blocks;
  p.unit_vectors = std::max<std::int64_t>(vectors(p, lanes), 1);
  if (p.depth > kStreams) p.unit_vectors = std::min(p.unit_vectors, kMaxVectors);
  while (units(p, lanes) < pieces && static_cast<double>(p.unit_rows * p.unit_vectors * lanes) * static_cast<double>(p.depth) > 2 * kMinWork) {
    if (p.unit_vectors == 1 || p.unit_rows > 4 * p.unit_vectors) {
      p.unit_rows = (p.unit_rows + 1) / 2;
    } else {
      p.unit_vectors = (p.unit_vectors + 1) / 2;
    }
  }
}

// Returns the parameters of a 1x1 convolution: x is [samples, in, pixels], w [out, in], bias [out] or null, y [samples, out, pixels].
template <typename T>
Params<T> conv1x1(const T* x, const T* w, const T* bias, T* y, std::int64_t samples, std::int64_t in, std::int64_t out, std::int64_t pixels) {
  return {w, x, bias, y, samples, out, pixels, in, 0, 0, nullptr};
}

// Computes the product. Of the parameters, unit_rows, unit_vectors and out_of_memory need not be set.
template <typename T>
void run(const Context& context, Params<T> p) {
  if (p.samples * p.rows * p.columns == 0) return;
  bool out_of_memory = false;
  p.out_of_memory = &out_of_memory;
  divide(p, hardware_threads());
  const auto kernel = cpu_kernel<T>();
  context.parallel(units(p, vector_lanes()), 1, [&](std::int64_t begin, std::int64_t end) { kernel(p, begin, end); });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace scm::product
