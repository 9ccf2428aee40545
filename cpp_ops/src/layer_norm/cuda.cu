// 1 to 32 lanes of a warp hold a row in registers, from the mean to the result; longer rows are read three times, the last two times from the cache. The mean is
// subtracted before the squares are added, so that nothing cancels if it is large.
#include "common/cuda.h"
#include "layer_norm/op.h"

namespace scm::layer_norm {
namespace {

template <typename T, int kWidth>
__device__ __forceinline__ float sum_of(const Vector<T, kWidth>& x) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += x[i];
  return sum;
}

template <typename T, int kWidth>
__device__ __forceinline__ float squares_of(const Vector<T, kWidth>& x, float mean) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

// Stores vector v of a row.
template <typename T, int kWidth>
__device__ __forceinline__ void write(const Params<T>& p, std::int64_t row, std::int64_t v, const Vector<T, kWidth>& x, float mean, float inverse) {
  const std::int64_t modulation = p.modulation_scale ? quotient(row, p.rows) * p.channels : 0;
  store(p.y + row * p.channels, v, vector_of<T, kWidth>([&](int i) {
    const std::int64_t c = v * kWidth + i;
    float y = (x[i] - mean) * inverse;
    if (p.scale) y *= p.scale[c];
    if (p.bias) y += p.bias[c];
    if (p.modulation_scale) y = y * (1.0f + to_float(p.modulation_scale[modulation + c])) + to_float(p.modulation_shift[modulation + c]);
    return y;
  }));
}

template <typename T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p, int lanes_of_row) {
  const int lanes = kWidth > 1 && kVectors > 2 ? static_cast<int>(kWarp) : lanes_of_row;  // a compile-time constant needs fewer address registers
  const int vectors = static_cast<int>(p.channels / kWidth), lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const std::int64_t rows = kThreads / lanes, all = p.samples * p.rows;
  const float inverse_channels = 1.0f / static_cast<float>(p.channels);
  for (std::int64_t first = blockIdx.x * rows; first < all; first += gridDim.x * rows) {
    const std::int64_t row = first + threadIdx.x / lanes;
    const int count = row < all ? vectors : 0;  // lanes without a row must execute group_sum too
    Vector<T, kWidth> x[kVectors];
    float sum = 0, squares = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * lanes < count) x[j] = load<kWidth>(p.x + row * p.channels, lane + j * lanes);
    }
    if (p.subtracts_mean) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (lane + j * lanes < count) sum += sum_of(x[j]);
      }
      sum = group_sum(sum, lanes);
    }
    const float mean = sum * inverse_channels;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * lanes < count) squares += squares_of(x[j], mean);
    }
    const float inverse = 1.0f / sqrtf(group_sum(squares, lanes) * inverse_channels + p.eps);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * lanes < count) write(p, row, lane + j * lanes, x[j], mean, inverse);
    }
  }
}

// For rows that do not fit into registers: one warp per row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) long_rows(const Params<T> p) {
  const std::int64_t vectors = p.channels / kWidth, warps = kThreads / kWarp, all = p.samples * p.rows;
  const float inverse_channels = 1.0f / static_cast<float>(p.channels);
  const int lane = threadIdx.x % kWarp;
  for (std::int64_t row = blockIdx.x * warps + threadIdx.x / kWarp; row < all; row += gridDim.x * warps) {
    const T* x = p.x + row * p.channels;
    float sum = 0, squares = 0;
    if (p.subtracts_mean) {
#pragma unroll 4
      for (std::int64_t v = lane; v < vectors; v += kWarp) sum += sum_of(load<kWidth>(x, v));
      sum = group_sum(sum, kWarp);
    }
    const float mean = sum * inverse_channels;
#pragma unroll 4
    for (std::int64_t v = lane; v < vectors; v += kWarp) squares += squares_of(load<kWidth>(x, v), mean);
    const float inverse = 1.0f / sqrtf(group_sum(squares, kWarp) * inverse_channels + p.eps);
    for (std::int64_t v = lane; v < vectors; v += kWarp) write(p, row, v, load<kWidth>(x, v), mean, inverse);
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  const std::int64_t rows = p.samples * p.rows;
  const bool wide = p.channels % kVectorWidth<T> == 0 && aligned(16, p.x, p.y);
  return with_row_shape<T>(p.channels, wide, [&](auto width, auto per_lane) {
    if constexpr (per_lane.value == 0) {
      return launch(long_rows<T, width.value>, grid_of(rows, kThreads / kWarp), kThreads, stream, p);
    } else {
      const int lanes = lanes_per_row(p.channels / width.value, per_lane.value);
      return launch(kernel<T, width.value, per_lane.value>, grid_of(rows, kThreads / lanes), kThreads, stream, p, lanes);
    }
  });
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::layer_norm
