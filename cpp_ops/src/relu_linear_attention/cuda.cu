// A block computes kColumns channels of the result for one head of one sample. First it adds up these columns of the head's state k^T [v, 1] in registers, a tile of tokens at a
// time, and stores them in shared memory. Then it multiplies the queries by them. Sums are in float32, in the order of the tokens, and then of the channels.
#include "common/cuda.h"
#include "relu_linear_attention/op.h"

namespace scm::relu_linear_attention {
namespace {

constexpr int kColumns = 32, kGroups = kThreads / kColumns;  // a thread has one column; the threads of a warp have the same rows

__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN

// Heads of up to kHead channels; tiles of kTokens tokens, so that shared memory suffices.
template <typename T, int kHead, int kTokens>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  alignas(16) __shared__ float rows[kTokens][kHead];  // keys or queries
  __shared__ float values[kTokens][kColumns], state[kHead][kColumns], sums[kHead];
  constexpr int kRows = kHead / kGroups, kQueries = kTokens / kGroups;  // per thread
  const int column = threadIdx.x % kColumns, group = threadIdx.x / kColumns, size = static_cast<int>(p.head_size);
  const std::int64_t token = p.heads * p.head_size, slices = ceil_div(p.head_size, kColumns);
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.heads * slices; unit += gridDim.x) {
    const std::int64_t index = quotient(unit, slices), sample = quotient(index, p.heads), first_column = (unit - index * slices) * kColumns;
    const std::int64_t start = sample * p.length * token + (index - sample * p.heads) * p.head_size;
    const bool has_column = first_column + column < p.head_size;
    const auto load_rows = [&](const T* x, std::int64_t first) {  // zeros outside of the tensor
      for (int i = threadIdx.x; i < kTokens * kHead; i += kThreads) {
        const int row = i / kHead, c = i % kHead;
        rows[row][c] = first + row < p.length && c < size ? relu(to_float(x[start + (first + row) * token + c])) : 0.0f;
      }
    };

    float sum[kRows] = {}, key_sum = 0;
    for (std::int64_t first = 0; first < p.length; first += kTokens) {
      __syncthreads();  // all threads have read the previous tile
      load_rows(p.k, first);
      for (int row = group; row < kTokens; row += kGroups) {
        values[row][column] = first + row < p.length && has_column ? to_float(p.v[start + (first + row) * token + first_column + column]) : 0.0f;
      }
      __syncthreads();
      const int count = p.length - first < kTokens ? static_cast<int>(p.length - first) : kTokens;
      for (int t = 0; t < count; ++t) {
        const float value = values[t][column];
#pragma unroll
        for (int i = 0; i < kRows; ++i) sum[i] += rows[t][group * kRows + i] * value;
        if (threadIdx.x < kHead) key_sum += rows[t][threadIdx.x];
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) state[group * kRows + i][column] = sum[i];
    if (threadIdx.x < kHead) sums[threadIdx.x] = key_sum;

    for (std::int64_t first = 0; first < p.length; first += kTokens) {
      __syncthreads();  // the state is complete, and all threads have read the previous tile
      load_rows(p.q, first);
      __syncthreads();
      float y[kQueries] = {}, denominator[kQueries] = {};
      for (int i = 0; i < size; ++i) {
        const float s = state[i][column], k = sums[i];
#pragma unroll
        for (int j = 0; j < kQueries; ++j) {
          const float q = rows[group * kQueries + j][i];
          y[j] += q * s;
          denominator[j] += q * k;
        }
      }
#pragma unroll
      for (int j = 0; j < kQueries; ++j) {
        const std::int64_t row = first + group * kQueries + j;
        if (row < p.length && has_column) p.y[start + row * token + first_column + column] = from_float<T>(y[j] / (denominator[j] + p.eps));
      }
    }
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  const dim3 grid = grid_of(p.samples * p.heads * ceil_div(p.head_size, kColumns), 1);
  if (p.head_size <= 32) return launch(kernel<T, 32, 64>, grid, kThreads, stream, p);
  if (p.head_size <= 64) return launch(kernel<T, 64, 64>, grid, kThreads, stream, p);
  if (p.head_size <= 128) return launch(kernel<T, 128, 32>, grid, kThreads, stream, p);
  return launch(kernel<T, 256, 8>, grid, kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::relu_linear_attention
