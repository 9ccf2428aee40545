// Mean and variance of contiguous elements, for the normalizations on the CPU.
#pragma once

#include "common/vector_math.h"

namespace scm {
inline namespace SCM_ISA {

// Mean and sum of squared deviations from the mean.
struct Moments {
  float mean, squares;
  std::int64_t count;

  float variance() const { return squares / static_cast<float>(count); }
};

// Returns the sum of f(x[i]) over all elements. f takes and returns a Vector.
template <typename T, typename F>
inline float sum_over(const T* x, std::int64_t count, const F& f) {
  Vector sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += f(load(x + i + j * kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) sums[0] += f(load(x + i));
  float sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (i < count) {
    const Vector last = f(load_part(x + i, count - i));
    for (std::int64_t lane = 0; lane < count - i; ++lane) sum += last[lane];
  }
  return sum;
}

// Computes the moments in blocks that fit into the L1 cache: the mean of a block first, then the squares of the differences from it, so that nothing cancels if
// the mean is large. Blocks are merged by the formula of Chan, Golub and LeVeque (The American Statistician, 1983), equation 2.1.
template <typename T>
inline Moments moments_of(const T* x, std::int64_t count) {
  constexpr std::int64_t kBlock = 4096;
  Moments all{0, 0, 0};
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t size = count - begin < kBlock ? count - begin : kBlock;
    const float mean = sum_over(x + begin, size, [](Vector v) { return v; }) / static_cast<float>(size);
    const float squares = sum_over(x + begin, size, [mean](Vector v) { return (v - mean) * (v - mean); });
    const std::int64_t total = all.count + size;
    const float delta = mean - all.mean, share = static_cast<float>(size) / static_cast<float>(total);
    all.mean += delta * share;
    all.squares += squares + delta * delta * (static_cast<float>(all.count) * share);
    all.count = total;
  }
  return all;
}

}  // namespace SCM_ISA
}  // namespace scm
