// Processes a block of queries against the keys of its head, kKeys keys at a time, so that scores and weights stay in the L1 cache. Everything is stored
// transposed, [keys, queries] and [channels, queries]: the lanes of a vector are queries, so that maxima, exponentials and sums need no reductions over lanes.
//
// The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867): when a query's maximum grows, what was summed is multiplied by a correction.
// Scores are in units of ln 2, so that exponentials are powers of two.
#include "attention/op.h"

#include <cstdlib>

#include "attention/mask.h"
#include "common/vector_math.h"

namespace scm::attention {
namespace {

constexpr std::int64_t kKeys = 64;  // keys per iteration
constexpr int kPadding = kLanes > kTileRows ? kLanes : kTileRows;  // channels are padded to multiples of both
static_assert(kQueries % kTileColumns == 0 && kKeys % kTileRows == 0 && kPadding % kLanes == 0 && kPadding % kTileRows == 0);

constexpr std::int64_t padded(std::int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Returns 2^x for x <= 0 with a relative error of 2e-7, or 0 if the result would be denormal. NaN stays NaN.
inline Vector power_of_two(Vector x) {
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer lands in the low bits
  const Vector r = x - (shifted - 12582912.0f);
  Vector p = r * 1.326472639e-3f + 9.671512697e-3f;
  p = p * r + 5.550733746e-2f;
  p = p * r + 2.402224208e-1f;
  p = p * r + 6.931469776e-1f;
  p = p * r + 1.0f;
  const Vector power = p * (Vector)(((Integers)shifted << 23) + 0x3f800000);
  return x < -126.0f ? Vector{} : power;
}

// Copies `count` rows of `size` elements as floats, padded with zeros to a multiple of kTileRows rows and to padded(size) columns.
template <typename T>
void copy_rows(const T* x, std::int64_t stride, std::int64_t count, std::int64_t size, float* copy) {
  const std::int64_t width = padded(size), padding = (kTileRows - count % kTileRows) % kTileRows;
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t c = 0; c < width; c += kLanes) {
      const std::int64_t rest = size - c;
      store(copy + row * width + c, rest >= kLanes ? load(x + row * stride + c) : rest > 0 ? load_part(x + row * stride + c, rest) : Vector{});
    }
  }
  __builtin_memset(copy + count * width, 0, static_cast<std::size_t>(padding * width) * sizeof(float));
}

// Writes `count` rows of `size` elements, multiplied by `factor`, into the columns of Q [padded(size), kQueries]. Further columns, up to `columns`, become 0.
template <typename T>
void load_transposed(const T* x, std::int64_t stride, std::int64_t count, std::int64_t size, float factor, float* Q, std::int64_t columns) {
  for (std::int64_t query = 0; query < columns; query += kLanes) {
    for (std::int64_t c = 0; c < size; c += kLanes) {
      Vector rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* const row = x + (query + i) * stride + c;
        rows[i] = query + i >= count ? Vector{} : size - c >= kLanes ? load(row) : load_part(row, size - c);
      }
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store(Q + (c + i) * kQueries + query, rows[i] * factor);
    }
  }
}

// Writes the first `count` columns of R [padded(size), kQueries], each multiplied by its element of `factors`, into rows of `size` elements.
template <typename T>
void store_transposed(const float* R, const float* factors, std::int64_t count, std::int64_t size, T* y, std::int64_t stride) {
  for (std::int64_t query = 0; query < count; query += kLanes) {
    const Vector factor = load(factors + query);
    for (std::int64_t c = 0; c < size; c += kLanes) {
      Vector rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = load(R + (c + i) * kQueries + query) * factor;
      transpose(rows);
      for (int i = 0; i < kLanes && query + i < count; ++i) {
        T* const row = y + (query + i) * stride + c;
        if (size - c >= kLanes) {
          store(row, rows[i]);
        } else {
          store_part(row, rows[i], size - c);
        }
      }
    }
  }
}

// bias_of for each lane.
inline Vector biases_of(Vector mask) {
  constexpr float kLargest = 3.402823466e38f;
  const Vector bias = mask * kLog2e, at_most = bias > kLargest ? broadcast(kLargest) : bias, finite = at_most < -kLargest ? broadcast(-kLargest) : at_most;
  return mask - mask == 0.0f ? finite : bias;
}

// Adds the mask of `keys` keys and `queries` queries, in units of ln 2, to the scores S [keys, kQueries] of `columns` queries.
template <typename T>
void add_mask(float* S, const T* mask, std::int64_t query_stride, std::int64_t keys, std::int64_t queries, std::int64_t columns) {
  if (query_stride == 0) {
    for (std::int64_t key = 0; key < keys; ++key) {
      const float bias = bias_of(to_float(mask[key]));
      for (std::int64_t query = 0; query < columns; query += kLanes) store(S + key * kQueries + query, load(S + key * kQueries + query) + bias);
    }
    return;
  }
  for (std::int64_t query = 0; query < queries; query += kLanes) {
    for (std::int64_t key = 0; key < keys; key += kLanes) {
      const std::int64_t count = smaller(keys - key, kLanes);
      Vector rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* const row = mask + (query + i) * query_stride + key;
        rows[i] = query + i >= queries ? Vector{} : count == kLanes ? load(row) : load_part(row, count);
      }
      transpose(rows);
      for (std::int64_t i = 0; i < count; ++i) {
        float* const scores = S + (key + i) * kQueries + query;
        store(scores, load(scores) + biases_of(rows[i]));
      }
    }
  }
}

// What is known of the softmax of each query of a block.
struct Softmax {
  float maxima[kQueries], sums[kQueries], corrections[kQueries];
};

// Replaces the scores S [keys, kQueries] by their exponentials relative to the maximum, and updates the maxima and sums. Returns whether any correction of the
// earlier sums is not 1.
bool exponentials(float* S, Softmax& softmax, std::int64_t keys, std::int64_t columns) {
  bool corrected = false;
  for (std::int64_t query = 0; query < columns; query += kLanes) {
    const Vector before = load(softmax.maxima + query);
    Vector partial[4] = {before, before, before, before};  // four chains: a maximum takes several cycles
    std::int64_t key = 0;
    for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vector score = load(S + (key + i) * kQueries + query);
        partial[i] = score > partial[i] ? score : partial[i];
      }
    }
    for (; key < keys; ++key) {
      const Vector score = load(S + key * kQueries + query);
      partial[0] = score > partial[0] ? score : partial[0];
    }
    const Vector left = partial[0] > partial[1] ? partial[0] : partial[1], right = partial[2] > partial[3] ? partial[2] : partial[3];
    const Vector maximum = left > right ? left : right;  // NaN is ignored here, and makes its own exponential NaN
    const Vector base = maximum == kMinusInfinity ? Vector{} : maximum;
    const Vector correction = power_of_two(before - base);
    Vector sum = load(softmax.sums + query) * correction;
    for (key = 0; key < keys; ++key) {
      float* const score = S + key * kQueries + query;
      const Vector weight = power_of_two(load(score) - base);
      store(score, weight);
      sum += weight;
    }
    store(softmax.maxima + query, maximum);
    store(softmax.sums + query, sum);
    store(softmax.corrections + query, correction);
    const auto changed = correction != 1.0f;
    for (int i = 0; i < kLanes; ++i) corrected |= changed[i] != 0;
  }
  return corrected;
}

// Layout of one thread's scratch memory: offsets in floats.
struct Scratch {
  std::int64_t queries, scores, keys, values, results, total;

  Scratch(std::int64_t size, std::int64_t value_size)
      : queries(0),
        scores(queries + padded(size) * kQueries),
        keys(scores + kKeys * kQueries),
        values(keys + kKeys * padded(size)),
        results(values + kKeys * padded(value_size)),
        total(results + padded(value_size) * kQueries) {}
};

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t blocks = query_blocks(p.queries), width = padded(p.size), value_width = padded(p.value_size);
  const Scratch at(p.size, p.value_size);
  constexpr std::uintptr_t kAlignment = 64;  // a vector does not cross a cache line
  void* const allocated = std::malloc(static_cast<std::size_t>(at.total) * sizeof(float) + kAlignment);
  if (!allocated) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  auto* const scratch = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(allocated) + kAlignment - 1) / kAlignment * kAlignment);
  float *Q = scratch + at.queries, *S = scratch + at.scores, *K = scratch + at.keys, *V = scratch + at.values, *R = scratch + at.results;
  Softmax softmax;
  const std::int64_t q_token = p.heads * p.size, k_token = p.key_heads * p.size, v_token = p.key_heads * p.value_size, y_token = p.heads * p.value_size;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t sample = unit / blocks / p.heads, head = unit / blocks % p.heads, first = unit % blocks * kQueries;
    const std::int64_t key_head = head / (p.heads / p.key_heads);
    const std::int64_t queries = smaller(p.queries - first, kQueries), columns = (queries + kTileColumns - 1) / kTileColumns * kTileColumns;
    const T* const k = p.k + sample * p.keys * k_token + key_head * p.size;
    const T* const v = p.v + sample * p.keys * v_token + key_head * p.value_size;
    const T* const mask = p.mask ? p.mask + sample * p.mask_strides[0] + head * p.mask_strides[1] + first * p.mask_strides[2] : nullptr;
    load_transposed(p.q + (sample * p.queries + first) * q_token + head * p.size, q_token, queries, p.size, p.scale * kLog2e, Q, columns);
    for (std::int64_t query = 0; query < kQueries; ++query) {
      softmax.maxima[query] = kMinusInfinity;
      softmax.sums[query] = 0;
    }
    if (p.keys == 0) __builtin_memset(R, 0, static_cast<std::size_t>(value_width * kQueries) * sizeof(float));
    for (std::int64_t key = 0; key < p.keys; key += kKeys) {
      const std::int64_t count = smaller(p.keys - key, kKeys);
      copy_rows(k + key * k_token, k_token, count, p.size, K);
      copy_rows(v + key * v_token, v_token, count, p.value_size, V);
      for (std::int64_t row = 0; row < count; row += kTileRows) {
        for (std::int64_t query = 0; query < columns; query += kTileColumns) {
          multiply_tile<false>(K + row * width, width, 1, Q + query, kQueries, S + row * kQueries + query, kQueries, p.size);
        }
      }
      if (mask) add_mask(S, mask + key, p.mask_strides[2], count, queries, columns);
      const bool corrected = exponentials(S, softmax, count, columns);
      for (std::int64_t query = 0; query < columns; query += kTileColumns) {
        for (std::int64_t c = 0; c < value_width; c += kTileRows) {
          float* const r = R + c * kQueries + query;
          if (key == 0) {
            multiply_tile<false>(V + c, 1, value_width, S + query, kQueries, r, kQueries, count);
            continue;
          }
          if (corrected) {
            const Vector left = load(softmax.corrections + query), right = load(softmax.corrections + query + kLanes);
            for (std::int64_t i = 0; i < kTileRows; ++i) {
              store(r + i * kQueries, load(r + i * kQueries) * left);
              store(r + i * kQueries + kLanes, load(r + i * kQueries + kLanes) * right);
            }
          }
          multiply_tile<true>(V + c, 1, value_width, S + query, kQueries, r, kQueries, count);
        }
      }
    }
    float* const factors = softmax.sums;
    for (std::int64_t query = 0; query < queries; ++query) factors[query] = p.keys == 0 ? 0 : 1 / factors[query];
    T* const y = p.y + (sample * p.queries + first) * y_token + head * p.value_size;
    store_transposed(R, factors, queries, p.value_size, y, y_token);
    for (std::int64_t query = 0; mask && query < queries; ++query) {
      const bool finite = factors[query] - factors[query] == 0;
      if (finite || !hides_all(mask + query * p.mask_strides[2], p.keys)) continue;
      for (std::int64_t c = 0; c < p.value_size; ++c) y[query * y_token + c] = from_float<T>(0);
    }
  }
  std::free(allocated);
}
SCM_INSTANTIATE_CPU

}  // namespace scm::attention
