// A block of queries against all keys of its head. Both products, q k^T and softmax v, go through one register-blocked multiplication whose vectors
// have the width of the instruction set; keys and values are laid out for it in panels of kColumns columns, padded with zeros.
#include "cosine_attention/op.h"

#include <cstdlib>

#include "common/math.h"

namespace scm::cosine_attention {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int kColumns = 2 * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

// C[kRows, columns] = A[kRows, depth] B, with B in panels [columns / kColumns, depth, kColumns]; B and C are aligned for vectors.
void multiply(const float* A, const float* B, float* C, std::int64_t depth, std::int64_t columns) {
  for (std::int64_t column = 0; column < columns; column += kColumns) {
    Vector sums[kRows][2] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
      const auto* b = reinterpret_cast<const Vector*>(B + column * depth + k * kColumns);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        sums[row][0] += A[row * depth + k] * b[0];
        sums[row][1] += A[row * depth + k] * b[1];
      }
    }
    for (int row = 0; row < kRows; ++row) {
      auto* c = reinterpret_cast<Vector*>(C + row * columns + column);
      c[0] = sums[row][0];
      c[1] = sums[row][1];
    }
  }
}

constexpr std::int64_t padded(std::int64_t count) { return (count + kColumns - 1) / kColumns * kColumns; }

// The factor that normalises a head's vector.
template <typename T>
float factor(const T* x, std::int64_t size, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t c = 0; c < size; ++c) sum += to_float(x[c]) * to_float(x[c]);
  return inverse_norm(sum, static_cast<float>(size), eps);
}

// Exponentials of the first `length` of a row of scores, zeros behind them; returns 1 / their sum.
float exponentials(float* scores, std::int64_t length, std::int64_t columns) {
  float largest = scores[0];
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < length; ++i) largest = scores[i] > largest ? scores[i] : largest;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < length; ++i) {
    const float below = scores[i] - largest;
    scores[i] = exponential(bounded(below, 87.0f)) + (below - below);  // NaN stays NaN
    sum += scores[i];
  }
  for (std::int64_t i = length; i < columns; ++i) scores[i] = 0;
  return 1 / sum;
}

// Floats of one thread: the keys and values of the head it is at, and a few rows of queries, scores and results.
struct Scratch {
  std::int64_t keys, values, queries, scores, results, total;

  explicit Scratch(std::int64_t length, std::int64_t size)
      : keys(0),
        values(keys + size * padded(length)),
        queries(values + padded(length) * padded(size)),
        scores(queries + padded(kRows * size)),
        results(scores + kRows * padded(length)),
        total(results + kRows * padded(size)) {}
};

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = p.head_size, length = p.length, blocks = query_blocks(length), keys = padded(length), width = padded(size);
  const Scratch at(length, size);
  const std::size_t bytes = static_cast<std::size_t>(at.total) * sizeof(float);  // every part is a multiple of kColumns
  auto* scratch = static_cast<float*>(std::aligned_alloc(kColumns * sizeof(float), bytes));
  if (!scratch) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  __builtin_memset(scratch, 0, bytes);
  float *K = scratch + at.keys, *V = scratch + at.values, *Q = scratch + at.queries, *S = scratch + at.scores, *R = scratch + at.results;
  const float temperature = 1 / __builtin_sqrtf(static_cast<float>(size));
  const std::int64_t token = 3 * p.heads * size;  // from one position to the next
  std::int64_t loaded = -1;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t head = unit / blocks;  // counted over all samples
    const std::int64_t sample = head / p.heads;
    const T* q = p.qkv + sample * length * token + head % p.heads * size;
    const T *k = q + p.heads * size, *v = k + p.heads * size;
    if (head != loaded) {
      loaded = head;
      for (std::int64_t l = 0; l < length; ++l) {
        const float norm_k = factor(k + l * token, size, p.eps), norm_v = factor(v + l * token, size, p.eps);
        float *column = K + l / kColumns * kColumns * size + l % kColumns, *row = V + l * kColumns;
        for (std::int64_t c = 0; c < size; ++c) column[c * kColumns] = to_float(k[l * token + c]) * norm_k;
        for (std::int64_t panel = 0; panel < size; panel += kColumns) {
          const std::int64_t count = size - panel < kColumns ? size - panel : kColumns;
          const T* part = v + l * token + panel;
#pragma omp simd
          for (std::int64_t c = 0; c < count; ++c) row[panel * keys + c] = to_float(part[c]) * norm_v;
        }
      }
    }
    const std::int64_t first = unit % blocks * kQueries, last = first + kQueries < length ? first + kQueries : length;
    for (std::int64_t query = first; query < last; query += kRows) {
      const std::int64_t rows = last - query < kRows ? last - query : kRows;
      for (std::int64_t row = 0; row < rows; ++row) {
        const T* x = q + (query + row) * token;
        const float scale = factor(x, size, p.eps) * temperature;
#pragma omp simd
        for (std::int64_t c = 0; c < size; ++c) Q[row * size + c] = to_float(x[c]) * scale;
      }
      multiply(Q, K, S, size, keys);
      float inverse[kRows];
      for (std::int64_t row = 0; row < kRows; ++row) inverse[row] = exponentials(S + row * keys, length, keys);
      multiply(S, V, R, keys, width);
      for (std::int64_t row = 0; row < rows; ++row) {
        T* y = p.y + ((sample * length + query + row) * p.heads + head % p.heads) * size;
#pragma omp simd
        for (std::int64_t c = 0; c < size; ++c) y[c] = from_float<T>(R[row * width + c] * inverse[row]);
      }
    }
  }
  std::free(scratch);
}
SCM_INSTANTIATE_CPU

}  // namespace scm::cosine_attention
