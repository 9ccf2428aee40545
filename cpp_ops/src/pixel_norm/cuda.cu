// y = x / (eps + |x| / sqrt(C)) for every row, and mp_silu(y) if `activated` is not null. 1 to 32 lanes of a warp hold a row in registers, from the sum of
// squares to the result; longer rows are read twice, the second time from the cache.
#include "common/cuda.h"
#include "pixel_norm/op.h"

namespace scm::pixel_norm {
namespace {

template <typename T, int kWidth>
__device__ __forceinline__ void write(const Params<T>& p, std::int64_t vector, const Vector<T, kWidth>& x, float scale) {
  const auto y = vector_of<T, kWidth>([&](int c) { return x[c] * scale; });
  store(p.y, vector, y);
  if (p.activated) store(p.activated, vector, activate(y));
}

template <typename T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p, int lanes_of_row) {
  const int lanes = kWidth > 1 && kVectors > 2 ? static_cast<int>(kWarp) : lanes_of_row;  // a compile-time constant needs fewer address registers
  const int vectors = static_cast<int>(p.channels / kWidth), lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const std::int64_t rows = kThreads / lanes;  // per block
  const float inverse_channels = __fdividef(1.0f, static_cast<float>(p.channels));
  for (std::int64_t first = blockIdx.x * rows; first < p.rows; first += gridDim.x * rows) {
    const std::int64_t row = first + threadIdx.x / lanes;
    const int count = row < p.rows ? vectors : 0;  // lanes without a row must execute group_sum too
    const std::int64_t start = row * vectors + lane;
    Vector<T, kWidth> x[kVectors];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * lanes < count) x[j] = load<kWidth>(p.x, start + j * lanes);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * lanes < count) sum += sum_of_squares(x[j]);
    }
    const float scale = norm_factor(group_sum(sum, lanes), inverse_channels, p.eps);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * lanes < count) write(p, start + j * lanes, x[j], scale);
    }
  }
}

// For rows that do not fit into registers: one warp per row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) long_rows(const Params<T> p) {
  const std::int64_t vectors = p.channels / kWidth, warps = kThreads / kWarp;
  const float inverse_channels = __fdividef(1.0f, static_cast<float>(p.channels));
  for (std::int64_t row = blockIdx.x * warps + threadIdx.x / kWarp; row < p.rows; row += gridDim.x * warps) {
    float sum = 0;
#pragma unroll 4
    for (std::int64_t v = threadIdx.x % kWarp; v < vectors; v += kWarp) sum += sum_of_squares(load<kWidth>(p.x, row * vectors + v));
    const float scale = norm_factor(group_sum(sum, kWarp), inverse_channels, p.eps);
    for (std::int64_t v = threadIdx.x % kWarp; v < vectors; v += kWarp) write(p, row * vectors + v, load<kWidth>(p.x, row * vectors + v), scale);
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  const bool wide = p.channels % kVectorWidth<T> == 0 && aligned(16, p.x, p.y, p.activated);
  return with_row_shape<T>(p.channels, wide, [&](auto width, auto per_lane) {
    if constexpr (per_lane.value == 0) {
      return launch(long_rows<T, width.value>, grid_of(p.rows, kThreads / kWarp), kThreads, stream, p);
    } else {
      const int lanes = lanes_per_row(p.channels / width.value, per_lane.value);
      return launch(kernel<T, width.value, per_lane.value>, grid_of(p.rows, kThreads / lanes), kThreads, stream, p, lanes);
    }
  });
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::pixel_norm
