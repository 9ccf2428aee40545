// Processes a block of queries against the keys of its head, kKeys keys at a time, so that scores and weights stay in the L1 cache. Scores are stored
// transposed, [keys, queries]: exponentials and their sums vectorize over queries, and keys and values are used in their original layout.
//
// A normalized vector has a length of at most sqrt(head_size), so scores are in [-sqrt(head_size), sqrt(head_size)]: the softmax does not need to subtract the
// maximum of each row.
#include "cosine_attention/op.h"

#include <cstdlib>

#include "common/rows.h"
#include "common/simd.h"

namespace scm::cosine_attention {
namespace {

constexpr std::int64_t kKeys = 64;  // keys per iteration
static_assert(kQueries % kTileColumns == 0 && kQueries % kTileRows == 0 && kKeys % kTileRows == 0);

constexpr std::int64_t padded(std::int64_t count) { return (count + kTileColumns - 1) / kTileColumns * kTileColumns; }

// kKeys rows of a tensor as floats: in place, or copied and zero-padded if `multiply_tile` could not read them in place.
struct Rows {
  const float* data;
  std::int64_t stride;
};

template <typename T>
Rows copy_rows(const T* x, std::int64_t token, std::int64_t count, std::int64_t size, float* copy) {
  const std::int64_t width = padded(size);
  for (std::int64_t row = 0; row < kKeys; ++row) {
    for (std::int64_t c = 0; c < width; ++c) copy[row * width + c] = row < count && c < size ? to_float(x[row * token + c]) : 0;
  }
  return {copy, width};
}

template <typename T>
Rows rows_of(const T* x, std::int64_t token, std::int64_t count, std::int64_t size, float* copy) {
  return copy_rows(x, token, count, size, copy);
}

inline Rows rows_of(const float* x, std::int64_t token, std::int64_t count, std::int64_t size, float* copy) {
  if (count == kKeys && size % kTileColumns == 0) return {x, token};
  return copy_rows(x, token, count, size, copy);
}

// Replaces a key's scores by its attention weights times its value's normalization factor, and adds the weights to the queries' sums.
inline void exponentials(float* scores, float* sums, std::int64_t queries, float norm_k, float norm_v) {
#pragma omp simd
  for (std::int64_t i = 0; i < queries; ++i) {
    const float score = scores[i] * norm_k;
    const float weight = exponential(clamp_magnitude(score, 87.0f)) + (score - score);  // NaN stays NaN
    sums[i] += weight;
    scores[i] = weight * norm_v;
  }
}

// Layout of one thread's scratch memory: offsets in floats.
struct Scratch {
  std::int64_t norms, queries, scores, sums, keys, values, results, total;

  explicit Scratch(std::int64_t length, std::int64_t size)
      : norms(0),
        queries(norms + 2 * length),
        scores(queries + size * kQueries),
        sums(scores + kKeys * kQueries),
        keys(sums + kQueries),
        values(keys + kKeys * padded(size)),
        results(values + kKeys * padded(size)),
        total(results + kQueries * padded(size)) {}
};

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = p.head_size, length = p.length, blocks = query_blocks(length), width = padded(size);
  const Scratch at(length, size);
  auto* scratch = static_cast<float*>(std::malloc(static_cast<std::size_t>(at.total) * sizeof(float)));
  if (!scratch) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  float *Q = scratch + at.queries, *S = scratch + at.scores, *sums = scratch + at.sums, *R = scratch + at.results;
  float *norm_k = scratch + at.norms, *norm_v = norm_k + length;
  const float temperature = 1 / __builtin_sqrtf(static_cast<float>(size));
  const std::int64_t token = 3 * p.heads * size;  // stride between tokens
  std::int64_t normalized_head = -1;  // the head that norm_k and norm_v belong to
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t sample = unit / blocks / p.heads, head = unit / blocks % p.heads, first = unit % blocks * kQueries;
    const std::int64_t queries = length - first < kQueries ? length - first : kQueries, columns = padded(queries);
    const T* q = p.qkv + sample * length * token + head * size;
    const T *k = q + p.heads * size, *v = k + p.heads * size;
    if (unit / blocks != normalized_head) {
      normalized_head = unit / blocks;
      for (std::int64_t l = 0; l < length; ++l) {
        norm_k[l] = row_norm_factor(k + l * token, size, p.eps);
        norm_v[l] = row_norm_factor(v + l * token, size, p.eps);
      }
    }
    for (std::int64_t query = 0; query < columns; ++query) {
      const T* x = q + (first + query) * token;
      const float scale = query < queries ? row_norm_factor(x, size, p.eps) * temperature : 0;
      for (std::int64_t c = 0; c < size; ++c) Q[c * kQueries + query] = query < queries ? to_float(x[c]) * scale : 0;
      sums[query] = 0;
    }
    for (std::int64_t i = 0; i < kQueries * width; ++i) R[i] = 0;
    for (std::int64_t key = 0; key < length; key += kKeys) {
      const std::int64_t count = length - key < kKeys ? length - key : kKeys;
      const Rows keys = rows_of(k + key * token, token, count, size, scratch + at.keys);
      const Rows values = rows_of(v + key * token, token, count, size, scratch + at.values);
      for (std::int64_t row = 0; row < count; row += kTileRows) {
        for (std::int64_t query = 0; query < columns; query += kTileColumns) {
          multiply_tile<false>(keys.data + row * keys.stride, keys.stride, 1, Q + query, kQueries, S + row * kQueries + query, kQueries, size);
        }
      }
      for (std::int64_t row = 0; row < count; ++row) {
        exponentials(S + row * kQueries, sums, columns, norm_k[key + row], norm_v[key + row]);
      }
      for (std::int64_t query = 0; query < queries; query += kTileRows) {
        for (std::int64_t c = 0; c < width; c += kTileColumns) {
          multiply_tile<true>(S + query, 1, kQueries, values.data + c, values.stride, R + query * width + c, width, count);
        }
      }
    }
    for (std::int64_t query = 0; query < queries; ++query) {
      T* y = p.y + ((sample * length + first + query) * p.heads + head) * size;
      const float inverse = 1 / sums[query];
#pragma omp simd
      for (std::int64_t c = 0; c < size; ++c) y[c] = from_float<T>(R[query * width + c] * inverse);
    }
  }
  std::free(scratch);
}
SCM_INSTANTIATE_CPU

}  // namespace scm::cosine_attention
