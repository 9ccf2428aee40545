// Attention on CUDA. A block processes the queries of one head and iterates over the head's keys and values in tiles; scores and exponentials stay in registers.
// The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), in units of ln 2, so that exponentials are powers of two.
//
// Heads of up to 128 channels use tensor cores, padded to kSize channels with zeros: `attention_16bit` for float16 and bfloat16, `attention_float32` with three TF32
// products. The values of a tile are copied while its keys are multiplied, and the keys of the next tile while the values are. `attention_any_size` handles
// larger heads with float32 arithmetic.
#include "attention/mask.h"
#include "attention/op.h"
#include "common/cuda.h"
#include "common/ptx.h"
#include "common/tf32.cuh"

namespace scm::attention {
namespace {

constexpr int kBlock = 128, kWarps = kBlock / kWarp, kBlockQueries = kWarps * 16;

// Pointers to one head of one sample, and strides between its tokens.
template <typename T>
struct Head {
  const T *q, *k, *v, *mask;
  T* y;
  std::int64_t q_token, k_token, v_token, y_token;

  __device__ __forceinline__ Head(const Params<T>& p, std::int64_t index)
      : mask(nullptr), q_token(p.heads * p.size), k_token(p.key_heads * p.size), v_token(p.key_heads * p.value_size), y_token(p.heads * p.value_size) {
    const std::int64_t sample = quotient(index, p.heads), head = index - sample * p.heads, key_head = quotient(head, quotient(p.heads, p.key_heads));
    q = p.q + sample * p.queries * q_token + head * p.size;
    k = p.k + sample * p.keys * k_token + key_head * p.size;
    v = p.v + sample * p.keys * v_token + key_head * p.value_size;
    y = p.y + sample * p.queries * y_token + head * p.value_size;
    if (p.mask) mask = p.mask + sample * p.mask_strides[0] + head * p.mask_strides[1];
  }

  // Returns a score in units of ln 2, with the mask.
  __device__ __forceinline__ float masked(const Params<T>& p, float score, std::int64_t query, std::int64_t key) const {
    score *= p.scale * kLog2e;
    return mask && query < p.queries ? score + bias_of(to_float(mask[query * p.mask_strides[2] + key])) : score;
  }

  // Returns the factor of a query's result, 1 / sum; 0 if the mask hides all keys, or if there are none. *hidden tells that the result must not be NaN either.
  __device__ __forceinline__ float inverse(const Params<T>& p, float sum, std::int64_t query, bool* hidden) const {
    const float factor = __fdividef(1.0f, sum);
    *hidden = p.keys == 0 || (mask && query < p.queries && !(factor - factor == 0) && hides_all(mask + query * p.mask_strides[2], p.keys));
    return factor;
  }
};

// Starts copying kRows rows of a tensor, padded with zeros, into shared memory. `wide`: rows are aligned to 16 bytes.
template <int kSize, int kRows, int kStride, typename T>
__device__ __forceinline__ void copy_tile(T (&tile)[kRows][kStride], const T* x, std::int64_t token, std::int64_t first, std::int64_t length, std::int64_t size,
                                          bool wide) {
  if (wide) {
    constexpr int kWidth = kVectorWidth<T>, kVectors = kSize / kWidth;
    for (int i = threadIdx.x; i < kRows * kVectors; i += kBlock) {
      const int row = i / kVectors, c = i % kVectors * kWidth;
      const bool inside = first + row < length && c < size;
      start_copy(&tile[row][c], inside ? x + (first + row) * token + c : x, inside);
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kSize; i += kBlock) {
      const int row = i / kSize, c = i % kSize;
      tile[row][c] = first + row < length && c < size ? x[(first + row) * token + c] : T{};
    }
  }
  commit_copies();
}

// The softmax of the two queries, g and g + 8, of which a lane holds scores; the four lanes of a group hold the same queries.
struct Softmax {
  float maxima[2] = {kMinusInfinity, kMinusInfinity}, sums[2] = {};  // sums: of the lane's scores

  // Replaces scores [n * 8 columns] by exponentials, and corrects the sums and the results for the new maxima.
  template <int kScores, int kResults>
  __device__ __forceinline__ void update(float (&scores)[kScores][4], float (&y)[kResults][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float maximum = maxima[half];
#pragma unroll
      for (int n = 0; n < kScores; ++n) maximum = fmaxf(maximum, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      for (int distance = 1; distance < 4; distance *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
      const float base = maximum == kMinusInfinity ? 0.0f : maximum;
      const float correction = exp2_approximate(maxima[half] - base);
      maxima[half] = maximum;
      sums[half] *= correction;
#pragma unroll
      for (int n = 0; n < kResults; ++n) {
        y[n][2 * half] *= correction;
        y[n][2 * half + 1] *= correction;
      }
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2_approximate(scores[n][i] - base);
          sums[half] += scores[n][i];
        }
      }
    }
  }
};

// -- float16 and bfloat16: 16 queries per warp ---------------------------------------------------------------------------------------

constexpr int kKeys16 = 64;

template <typename T>
__device__ __forceinline__ std::uint32_t load_pair(const T* row, std::int64_t c, std::int64_t size, bool wide) {
  if (wide) return c < size ? load<2>(row + c, 0).words[0] : 0;
  return (c < size ? row[c].bits : 0u) | (c + 1 < size ? std::uint32_t{row[c + 1].bits} << 16 : 0u);
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kBlock) attention_16bit(const Params<T> p, bool wide) {
  constexpr int kStride = kSize + 8;  // the eight rows that ldmatrix reads together are in different banks
  alignas(16) __shared__ T keys[kKeys16][kStride];
  alignas(16) __shared__ T values[kKeys16][kStride];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t blocks = ceil_div(p.queries, kBlockQueries);
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.heads * blocks; unit += gridDim.x) {
    const std::int64_t index = quotient(unit, blocks);
    const Head<T> head(p, index);
    const std::int64_t first_query = (unit - index * blocks) * kBlockQueries + warp * 16 + g;  // this lane's first query
    __syncthreads();  // all threads have finished the previous unit
    copy_tile<kSize>(keys, head.k, head.k_token, 0, p.keys, p.size, wide);

    std::uint32_t q[kSize / 16][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t query = first_query + half * 8;
      const T* row = head.q + query * head.q_token;
#pragma unroll
      for (int step = 0; step < kSize / 16; ++step) {
        const std::int64_t c = step * 16 + 2 * t;
        q[step][half] = query < p.queries ? load_pair(row, c, p.size, wide) : 0u;
        q[step][half + 2] = query < p.queries ? load_pair(row, c + 8, p.size, wide) : 0u;
      }
    }

    float y[kSize / 8][4] = {};
    Softmax softmax;
    for (std::int64_t first = 0; first < p.keys; first += kKeys16) {
      const int count = p.keys - first < kKeys16 ? static_cast<int>(p.keys - first) : kKeys16;
      copy_tile<kSize>(values, head.v, head.v_token, first, p.keys, p.value_size, wide);
      wait_for_copies<1>();
      __syncthreads();  // the keys are there

      float scores[kKeys16 / 8][4] = {};
#pragma unroll
      for (int n = 0; n < kKeys16 / 8; n += 2) {
        if (n * 8 >= count) break;
#pragma unroll
        for (int step = 0; step < kSize / 16; ++step) {
          std::uint32_t b[4];
          load_matrices(b, &keys[n * 8 + lane % 8 + lane / 16 * 8][step * 16 + lane / 8 % 2 * 8]);
          multiply_add<T>(scores[n], q[step], b[0], b[1]);
          multiply_add<T>(scores[n + 1], q[step], b[2], b[3]);
        }
      }
      __syncthreads();  // all threads have read the keys
      copy_tile<kSize>(keys, head.k, head.k_token, first + kKeys16, p.keys, p.size, wide);

#pragma unroll
      for (int n = 0; n < kKeys16 / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = n * 8 + 2 * t + i % 2;
          scores[n][i] = key < count ? head.masked(p, scores[n][i], first_query + i / 2 * 8, first + key) : kMinusInfinity;
        }
      }
      softmax.update(scores, y);

      wait_for_copies<1>();
      __syncthreads();  // the values are there
      // A lane holds the same elements of the scores (operand C) as it needs of the exponentials (operand A).
#pragma unroll
      for (int step = 0; step < kKeys16 / 16; ++step) {
        if (step * 16 >= count) break;
        const float(&low)[4] = scores[2 * step], (&high)[4] = scores[2 * step + 1];
        const std::uint32_t weights[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
        for (int n = 0; n < kSize / 8; n += 2) {
          std::uint32_t b[4];
          load_matrices_transposed(b, &values[step * 16 + lane % 16][n * 8 + lane / 16 * 8]);
          multiply_add<T>(y[n], weights, b[0], b[1]);
          multiply_add<T>(y[n + 1], weights, b[2], b[3]);
        }
      }
      __syncthreads();  // all threads have read the values
    }
    wait_for_copies<0>();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t query = first_query + half * 8;
      bool hidden;
      const float inverse = head.inverse(p, group_sum(softmax.sums[half], 4), query, &hidden);
      if (query >= p.queries) continue;
      T* out = head.y + query * head.y_token;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        const int c = n * 8 + 2 * t;
        const float left = hidden ? 0.0f : y[n][2 * half] * inverse, right = hidden ? 0.0f : y[n][2 * half + 1] * inverse;
        if (wide) {
          if (c < p.value_size) reinterpret_cast<std::uint32_t*>(out)[c / 2] = pack<T>(left, right);
        } else {
          if (c < p.value_size) out[c] = from_float<T>(left);
          if (c + 1 < p.value_size) out[c + 1] = from_float<T>(right);
        }
      }
    }
  }
}

// -- float32: 16 queries per warp --------------------------------------------------------------------------------------------------
//
// The order of the terms of a sum and the order of the columns are free. Channels, keys and result columns are permuted so that a lane's elements are contiguous
// in memory. In the first product, k indices t and t + 4 of steps 2s and 2s + 1 are channels 16s + 4t to 16s + 4t + 3. In the second, k indices t and t + 4 are
// keys 2t and 2t + 1, which are the scores that the lane holds, and column g of matrix n is channel 32 (n / 4) + 4g + n % 4.

constexpr int kKeys32 = 32;

template <int kSize>
__global__ void __launch_bounds__(kBlock) attention_float32(const Params<float> p, bool wide) {
  constexpr int kStrideK = kSize + 16, kStrideV = kSize + 4;  // no bank conflicts for the way the rows are read
  alignas(16) __shared__ float keys[kKeys32][kStrideK];
  alignas(16) __shared__ float values[kKeys32][kStrideV];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t blocks = ceil_div(p.queries, kBlockQueries);
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.heads * blocks; unit += gridDim.x) {
    const std::int64_t index = quotient(unit, blocks);
    const Head<float> head(p, index);
    const std::int64_t first_query = (unit - index * blocks) * kBlockQueries + warp * 16 + g;  // this lane's first query
    __syncthreads();  // all threads have finished the previous unit
    copy_tile<kSize>(keys, head.k, head.k_token, 0, p.keys, p.size, wide);

    float q[2][kSize / 16][4];  // of rows g, g + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t query = first_query + half * 8;
#pragma unroll
      for (int s = 0; s < kSize / 16; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = s * 16 + 4 * t + i;
          q[half][s][i] = query < p.queries && c < p.size ? head.q[query * head.q_token + c] : 0.0f;
        }
      }
    }

    float y[kSize / 8][4] = {};
    Softmax softmax;
    for (std::int64_t first = 0; first < p.keys; first += kKeys32) {
      const int count = p.keys - first < kKeys32 ? static_cast<int>(p.keys - first) : kKeys32;
      copy_tile<kSize>(values, head.v, head.v_token, first, p.keys, p.value_size, wide);
      wait_for_copies<1>();
      __syncthreads();  // the keys are there

      float scores[kKeys32 / 8][4] = {};
#pragma unroll
      for (int s = 0; s < kSize / 16; ++s) {
        const float(&low)[4] = q[0][s], (&high)[4] = q[1][s];
        const SplitA even(low[0], high[0], low[1], high[1]), odd(low[2], high[2], low[3], high[3]);
#pragma unroll
        for (int n = 0; n < kKeys32 / 8; ++n) {
          const Vector<float, 4> k = load<4>(keys[n * 8 + g], s * 4 + t);
          multiply_add_split(scores[n], even, Split(k[0]), Split(k[1]));
          multiply_add_split(scores[n], odd, Split(k[2]), Split(k[3]));
        }
      }
      __syncthreads();  // all threads have read the keys
      copy_tile<kSize>(keys, head.k, head.k_token, first + kKeys32, p.keys, p.size, wide);

#pragma unroll
      for (int n = 0; n < kKeys32 / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = n * 8 + 2 * t + i % 2;
          scores[n][i] = key < count ? head.masked(p, scores[n][i], first_query + i / 2 * 8, first + key) : kMinusInfinity;
        }
      }
      softmax.update(scores, y);

      wait_for_copies<1>();
      __syncthreads();  // the values are there
#pragma unroll
      for (int n = 0; n < kKeys32 / 8; ++n) {
        if (n * 8 >= count) break;
        const SplitA weights(scores[n][0], scores[n][2], scores[n][1], scores[n][3]);
#pragma unroll
        for (int part = 0; part < kSize / 32; ++part) {
          const Vector<float, 4> even = load<4>(values[n * 8 + 2 * t], part * 8 + g), odd = load<4>(values[n * 8 + 2 * t + 1], part * 8 + g);
#pragma unroll
          for (int i = 0; i < 4; ++i) multiply_add_split(y[part * 4 + i], weights, Split(even[i]), Split(odd[i]));
        }
      }
      __syncthreads();  // all threads have read the values
    }
    wait_for_copies<0>();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t query = first_query + half * 8;
      bool hidden;
      const float inverse = head.inverse(p, group_sum(softmax.sums[half], 4), query, &hidden);
      if (query >= p.queries) continue;
      float* out = head.y + query * head.y_token;
#pragma unroll
      for (int part = 0; part < kSize / 32; ++part) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {  // 2t, 2t + 1
          const int c = part * 32 + (2 * t + column) * 4;
          const auto result = [&](int i) { return hidden ? 0.0f : y[part * 4 + i][half * 2 + column] * inverse; };
          if (wide && c < p.value_size) store(out, c / 4, vector_of<float, 4>(result));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!wide && c + i < p.value_size) out[c + i] = result(i);
          }
        }
      }
    }
  }
}

// -- Any head size: 32 queries and kSlice result channels per block ----------------------------------------------------------------------
//
// Eight neighboring threads share a query; each has four of a tile's 32 keys and an eighth of the slice's channels.

constexpr int kQueriesAny = 32, kKeysAny = 32, kDepth = 32, kSlice = 64, kBlockAny = 256, kLanesAny = kBlockAny / kQueriesAny;

// Loads 32 rows by kColumns channels, and zeros outside of the tensor.
template <int kColumns, int kStride, typename T>
__device__ void load_tile(float (&tile)[kKeysAny][kStride], const T* x, std::int64_t token, std::int64_t first, std::int64_t length, std::int64_t channel,
                          std::int64_t size) {
  for (int i = threadIdx.x; i < kKeysAny * kColumns; i += kBlockAny) {
    const int row = i / kColumns, c = i % kColumns;
    tile[row][c] = first + row < length && channel + c < size ? to_float(x[(first + row) * token + channel + c]) : 0.0f;
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockAny) attention_any_size(const Params<T> p) {
  __shared__ float q[kQueriesAny][kDepth + 1], k[kKeysAny][kDepth + 1], v[kKeysAny][kSlice], weights[kQueriesAny][kKeysAny + 1];
  const int row = threadIdx.x / kLanesAny, lane = threadIdx.x % kLanesAny;
  const std::int64_t blocks = ceil_div(p.queries, kQueriesAny), slices = ceil_div(p.value_size, kSlice);
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.heads * blocks * slices; unit += gridDim.x) {
    const std::int64_t block = quotient(unit, slices), slice = (unit - block * slices) * kSlice, index = quotient(block, blocks);
    const Head<T> head(p, index);
    const std::int64_t first_query = (block - index * blocks) * kQueriesAny, query = first_query + row;

    float y[kSlice / kLanesAny] = {}, maximum = kMinusInfinity, sum = 0;
    for (std::int64_t first = 0; first < p.keys; first += kKeysAny) {
      float scores[kKeysAny / kLanesAny] = {};
      for (std::int64_t channel = 0; channel < p.size; channel += kDepth) {
        __syncthreads();  // all threads have read the previous tiles
        load_tile<kDepth>(q, head.q, head.q_token, first_query, p.queries, channel, p.size);
        load_tile<kDepth>(k, head.k, head.k_token, first, p.keys, channel, p.size);
        if (channel == 0) load_tile<kSlice>(v, head.v, head.v_token, first, p.keys, slice, p.value_size);
        __syncthreads();
        for (int c = 0; c < kDepth; ++c) {
#pragma unroll
          for (int j = 0; j < kKeysAny / kLanesAny; ++j) scores[j] += q[row][c] * k[lane + j * kLanesAny][c];
        }
      }

      float largest = maximum;
#pragma unroll
      for (int j = 0; j < kKeysAny / kLanesAny; ++j) {
        const std::int64_t key = first + lane + j * kLanesAny;
        scores[j] = key < p.keys ? head.masked(p, scores[j], query, key) : kMinusInfinity;
        largest = fmaxf(largest, scores[j]);
      }
      for (int distance = kLanesAny / 2; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      const float base = largest == kMinusInfinity ? 0.0f : largest, correction = exp2_approximate(maximum - base);
      maximum = largest;
      sum *= correction;
#pragma unroll
      for (int j = 0; j < kKeysAny / kLanesAny; ++j) {
        const float weight = exp2_approximate(scores[j] - base);
        sum += weight;
        weights[row][lane + j * kLanesAny] = weight;
      }
      __syncwarp();  // the eight threads of a query are in one warp
      const int count = p.keys - first < kKeysAny ? static_cast<int>(p.keys - first) : kKeysAny;
#pragma unroll
      for (int i = 0; i < kSlice / kLanesAny; ++i) {
        y[i] *= correction;
        for (int key = 0; key < count; ++key) y[i] += weights[row][key] * v[key][lane + i * kLanesAny];
      }
    }

    bool hidden;
    const float inverse = head.inverse(p, group_sum(sum, kLanesAny), query, &hidden);
    if (query < p.queries) {
#pragma unroll
      for (int i = 0; i < kSlice / kLanesAny; ++i) {
        const std::int64_t c = slice + lane + i * kLanesAny;
        if (c < p.value_size) head.y[query * head.y_token + c] = from_float<T>(hidden ? 0.0f : y[i] * inverse);
      }
    }
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  const std::int64_t heads = p.samples * p.heads, size = p.size > p.value_size ? p.size : p.value_size;
  const dim3 grid = grid_of(heads * ceil_div(p.queries, kBlockQueries), 1);
  const bool wide = p.size % kVectorWidth<T> == 0 && p.value_size % kVectorWidth<T> == 0 && aligned(16, p.q, p.k, p.v, p.y);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (size <= 32) return launch(attention_float32<32>, grid, kBlock, stream, p, wide);
    if (size <= 64) return launch(attention_float32<64>, grid, kBlock, stream, p, wide);
    if (size <= 128) return launch(attention_float32<128>, grid, kBlock, stream, p, wide);
  } else {
    if (size <= 32) return launch(attention_16bit<T, 32>, grid, kBlock, stream, p, wide);
    if (size <= 48) return launch(attention_16bit<T, 48>, grid, kBlock, stream, p, wide);
    if (size <= 64) return launch(attention_16bit<T, 64>, grid, kBlock, stream, p, wide);
    if (size <= 80) return launch(attention_16bit<T, 80>, grid, kBlock, stream, p, wide);
    if (size <= 128) return launch(attention_16bit<T, 128>, grid, kBlock, stream, p, wide);
  }
  return launch(attention_any_size<T>, grid_of(heads * ceil_div(p.queries, kQueriesAny) * ceil_div(p.value_size, kSlice), 1), kBlockAny, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::attention
