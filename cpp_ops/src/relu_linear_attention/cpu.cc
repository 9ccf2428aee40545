// A unit of work is one head of one sample. First it adds up the head's state k^T [v, 1], then it multiplies the queries by it, kTokens tokens at a time. Sums are in
// float32, in the order of the tokens, and then of the channels.
#include "relu_linear_attention/op.h"

#include <cstdlib>

#include "common/simd.h"

namespace scm::relu_linear_attention {
namespace {

constexpr std::int64_t kTokens = 64;  // per iteration
static_assert(kTokens % kTileRows == 0 && kTileColumns % kTileRows == 0);

constexpr std::int64_t padded(std::int64_t count) { return (count + kTileColumns - 1) / kTileColumns * kTileColumns; }

inline float relu(float x) { return x < 0 ? 0 : x; }  // NaN stays NaN

// Copies `count` rows of `size` elements with strides of `stride` to rows of `width` floats, and pads them with zeros.
template <bool kRelu, typename T>
inline void copy_rows(const T* x, std::int64_t stride, std::int64_t count, std::int64_t size, std::int64_t width, float* copy) {
  for (std::int64_t row = 0; row < count; ++row) {
    const T* const from = x + row * stride;
    float* const to = copy + row * width;
#pragma omp simd
    for (std::int64_t c = 0; c < size; ++c) to[c] = kRelu ? relu(to_float(from[c])) : to_float(from[c]);
    for (std::int64_t c = size; c < width; ++c) to[c] = 0;
  }
}

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = p.head_size, width = padded(size), token = p.heads * size;
  const std::int64_t floats = width * width + width + 2 * kTokens * width;
  auto* const scratch = static_cast<float*>(std::calloc(static_cast<std::size_t>(floats), sizeof(float)));
  if (!scratch) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  float *const state = scratch, *const sums = state + width * width, *const rows = sums + width, *const others = rows + kTokens * width;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t start = unit / p.heads * p.length * token + unit % p.heads * size;
    for (std::int64_t i = 0; i < width * width + width; ++i) state[i] = 0;  // and the sums
    for (std::int64_t first = 0; first < p.length; first += kTokens) {
      const std::int64_t count = p.length - first < kTokens ? p.length - first : kTokens;
      copy_rows<true>(p.k + start + first * token, token, count, size, width, rows);
      copy_rows<false>(p.v + start + first * token, token, count, size, width, others);
      for (std::int64_t row = 0; row < count; ++row) {
#pragma omp simd
        for (std::int64_t c = 0; c < width; ++c) sums[c] += rows[row * width + c];
      }
      for (std::int64_t i = 0; i < size; i += kTileRows) {
        for (std::int64_t c = 0; c < width; c += kTileColumns) {
          multiply_tile<true>(rows + i, 1, width, others + c, width, state + i * width + c, width, count);
        }
      }
    }
    for (std::int64_t first = 0; first < p.length; first += kTokens) {
      const std::int64_t count = p.length - first < kTokens ? p.length - first : kTokens;
      copy_rows<true>(p.q + start + first * token, token, count, size, width, rows);
      for (std::int64_t row = 0; row < count; row += kTileRows) {  // the results of rows after the last one are not used
        for (std::int64_t c = 0; c < width; c += kTileColumns) {
          multiply_tile<false>(rows + row * width, width, 1, state + c, width, others + row * width + c, width, size);
        }
      }
      for (std::int64_t row = 0; row < count; ++row) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t c = 0; c < size; ++c) sum += rows[row * width + c] * sums[c];
        const float inverse = 1 / (sum + p.eps);
        T* const y = p.y + start + (first + row) * token;
#pragma omp simd
        for (std::int64_t c = 0; c < size; ++c) y[c] = from_float<T>(others[row * width + c] * inverse);
      }
    }
  }
  std::free(scratch);
}
SCM_INSTANTIATE_CPU

}  // namespace scm::relu_linear_attention
