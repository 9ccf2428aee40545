// Mean and variance of contiguous elements, for the normalizations on the CPU.
#pragma once

#include "common/vector_math.h"

namespace scm {
inline namespace SCM_ISA {

// The mean is base + offset: as a single number it would be rounded, and the rounding of a large mean is large relative to the deviations. `squares` is the sum of
// the squared deviations.
struct Moments {
  float base, offset, squares;
  std::int64_t count;

  float variance() const { return (squares < 0 ? 0 : squares) / static_cast<float>(count); }  // NaN stays NaN
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

struct Deviations {
  float sum, squares;
};

// Returns the sums of x[i] - base and of its squares.
template <typename T>
inline Deviations deviations_from(float base, const T* x, std::int64_t count) {
  Vector sums[2] = {}, squares[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Vector deviation = load(x + i + j * kLanes) - base;
      sums[j] += deviation;
      squares[j] += deviation * deviation;
    }
  }
  Deviations all{sum_of_lanes(sums[0] + sums[1]), sum_of_lanes(squares[0] + squares[1])};
  for (; i < count; ++i) {
    const float deviation = to_float(x[i]) - base;
    all.sum += deviation;
    all.squares += deviation * deviation;
  }
  return all;
}

// Computes the moments in blocks that fit into the L1 cache: the mean of a block first, then the deviations from it, so that nothing cancels if the mean is large.
// Blocks are merged by the formula of Chan, Golub and LeVeque (The American Statistician, 1983), equation 2.1.
template <typename T>
inline Moments moments_of(const T* x, std::int64_t count) {
  constexpr std::int64_t kBlock = 4096;
  Moments all{0, 0, 0, 0};
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t size = count - begin < kBlock ? count - begin : kBlock;
    const float base = sum_over(x + begin, size, [](Vector v) { return v; }) / static_cast<float>(size);
    const Deviations deviations = deviations_from(base, x + begin, size);
    const float residual = deviations.sum / static_cast<float>(size), squares = deviations.squares - deviations.sum * residual;
    if (begin == 0) all.base = base;
    const std::int64_t total = all.count + size;
    const float delta = (base - all.base) + residual - all.offset, share = static_cast<float>(size) / static_cast<float>(total);
    all.offset += delta * share;
    all.squares += squares + delta * delta * (static_cast<float>(all.count) * share);
    all.count = total;
  }
  return all;
}

}  // namespace SCM_ISA
}  // namespace scm
