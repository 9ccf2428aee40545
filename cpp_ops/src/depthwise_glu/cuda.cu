// A block computes a tile of one output channel of one sample: it activates the tile of both input channels, with a margin of one pixel, into shared memory, and then
// convolves them. blockIdx.y is the sample.
#include "common/cuda.h"
#include "depthwise_glu/op.h"

namespace scm::depthwise_glu {
namespace {

constexpr int kColumns = 32, kRows = 32;  // of a tile
constexpr int kStride = kColumns + 2;

template <typename T>
__device__ __forceinline__ float convolve(const float (&tile)[kRows + 2][kStride], int row, int column, const T* filter, const T* bias) {
  float sum = to_float(*bias);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int j = 0; j < 3; ++j) sum += to_float(filter[3 * i + j]) * tile[row + i][column + j];
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  __shared__ float tiles[2][kRows + 2][kStride];
  const std::int64_t plane = p.height * p.width, across = ceil_div(p.width, kColumns), down = ceil_div(p.height, kRows);
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    for (std::int64_t unit = blockIdx.x; unit < p.channels * across * down; unit += gridDim.x) {
      const std::int64_t channel = quotient(unit, across * down), tile = unit - channel * across * down, tile_row = quotient(tile, across);
      const std::int64_t first_row = tile_row * kRows, first_column = (tile - tile_row * across) * kColumns;
      const int rows = static_cast<int>(p.height - first_row < kRows ? p.height - first_row : kRows);
      __syncthreads();  // all threads have read the previous tiles
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* x = p.x + ((2 * sample + half) * p.channels + channel) * plane;
        for (int i = threadIdx.x; i < (rows + 2) * kStride; i += kThreads) {
          const std::int64_t row = first_row + i / kStride - 1, column = first_column + i % kStride - 1;
          const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
          tiles[half][i / kStride][i % kStride] = inside ? silu(to_float(x[row * p.width + column])) : 0.0f;
        }
      }
      __syncthreads();
      const int column = threadIdx.x % kColumns;
      for (int row = threadIdx.x / kColumns; row < rows && first_column + column < p.width; row += kThreads / kColumns) {
        const float a = convolve(tiles[0], row, column, p.w + channel * 9, p.b + channel);
        const float g = convolve(tiles[1], row, column, p.w + (p.channels + channel) * 9, p.b + p.channels + channel);
        p.y[(sample * p.channels + channel) * plane + (first_row + row) * p.width + first_column + column] = from_float<T>(a * silu(g));
      }
    }
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  return launch(kernel<T>, grid_of(p.channels * ceil_div(p.height, kRows) * ceil_div(p.width, kColumns), 1, p.samples), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::depthwise_glu
