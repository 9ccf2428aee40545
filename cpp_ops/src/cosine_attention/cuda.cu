// Fused attention. A block processes 64 or 128 queries of one head and iterates over the head's keys and values in tiles. Scores, exponentials and the result
// stay in registers; at any time only the scores of a warp's queries by a few keys exist.
//
// Heads of 64 channels, as in EDM2 networks, use tensor cores: `attention_16bit` for float16 and bfloat16, `attention_float32` for float32 with three TF32
// products (3xTF32), which keep float32's accuracy. Keys and values are normalized before they are stored in shared memory, while the next tile's loads are in
// flight. Queries are not normalized: their factors scale the scores.
//
// A normalized vector has a length of at most sqrt(64), so a score divided by sqrt(64) is in [-8, 8] and its exponential in [3e-4, 2981]: the softmax does not
// need the maximum, and the exponentials fit into float16.
//
// `attention_any_size` handles all other head sizes, and pointers that are not aligned, with float32 arithmetic.
#include "common/cuda.h"
#include "common/ptx.h"
#include "common/tf32.cuh"
#include "cosine_attention/op.h"

namespace scm::cosine_attention {
namespace {

constexpr int kHead = 64;  // head size of the tensor core kernels
constexpr int kBlock = 128, kWarps = kBlock / kWarp;
constexpr float kLog2e = 1.44269504f;

// Pointers to one head of one sample.
template <typename T>
struct Head {
  const T *q, *k, *v;
  T* y;
  std::int64_t token, out_token;  // strides between tokens in qkv and in y

  __device__ __forceinline__ Head(const Params<T>& p, std::int64_t index) : token(3 * p.heads * p.head_size), out_token(p.heads * p.head_size) {
    const std::int64_t sample = quotient(index, p.heads), head = index - sample * p.heads;
    q = p.qkv + sample * p.length * token + head * p.head_size;
    k = q + out_token;
    v = k + out_token;
    y = p.y + sample * p.length * out_token + head * p.head_size;
  }
};

// A tile of keys and values in registers, between global and shared memory. Each thread holds vectors of 16 bytes; the threads of a row are neighbors.
template <typename T, int kKeys>
struct Tile {
  static constexpr int kWidth = kVectorWidth<T>, kLanes = kHead / kWidth, kRows = kBlock / kLanes, kVectors = kKeys / kRows;
  Vector<T, kWidth> k[kVectors], v[kVectors];

  __device__ __forceinline__ void load_from(const Head<T>& head, std::int64_t first, std::int64_t length) {
    const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const std::int64_t key = first + row + j * kRows;
      k[j] = v[j] = {};
      if (key < length) {
        k[j] = load<kWidth>(head.k + key * head.token, lane);
        v[j] = load<kWidth>(head.v + key * head.token, lane);
      }
    }
  }

  // Rows past the last key are set to zero even if eps is 0: their exponentials are zero, and zero times NaN would be NaN.
  template <int kStrideK, int kStrideV>
  __device__ __forceinline__ void store_to(T (&keys)[kKeys][kStrideK], T (&values)[kKeys][kStrideV], std::int64_t first, std::int64_t length, float eps) const {
    const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const bool inside = first + row + j * kRows < length;
      store(keys[row + j * kRows], lane, normalized(k[j], inside, eps));
      store(values[row + j * kRows], lane, normalized(v[j], inside, eps));
    }
  }

 private:
  static __device__ __forceinline__ Vector<T, kWidth> normalized(const Vector<T, kWidth>& x, bool inside, float eps) {
    const float norm = norm_factor(group_sum(sum_of_squares(x), kLanes), 1.0f / kHead, eps), factor = inside ? norm : 0.0f;
    return vector_of<T, kWidth>([&](int i) { return x[i] * factor; });
  }
};

// Returns the factor of a query's scores, including log2(e) for exp2. `squares` is the sum of squares of the lane's quarter of the query.
__device__ __forceinline__ float query_scale(float squares, float eps) { return norm_factor(group_sum(squares, 4), 1.0f / kHead, eps) * (kLog2e / 8); }

// -- float16 and bfloat16: kTiles times 16 queries per warp ---------------------------------------------------------------------------

constexpr int kKeys16 = 64;
constexpr int kStride16 = kHead + 8;  // 144 bytes: the eight rows that ldmatrix reads together are in different banks

template <typename T>
__device__ __forceinline__ void load_pair(const T* x, std::uint32_t& bits, float& squares) {
  const Vector<T, 2> pair = load<2>(x, 0);
  bits = pair.words[0];
  squares += sum_of_squares(pair);
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kBlock, 2) attention_16bit(const Params<T> p) {
  alignas(16) __shared__ T keys[kKeys16][kStride16];
  alignas(16) __shared__ T values[kKeys16][kStride16];
  constexpr int kQueries = kWarps * kTiles * 16, kChunk = 32 / kTiles;  // keys per iteration: enough independent products, few enough registers
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t blocks = ceil_div(p.length, kQueries);
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.heads * blocks; unit += gridDim.x) {
    const std::int64_t index = quotient(unit, blocks);
    const Head<T> head(p, index);
    const std::int64_t first_query = (unit - index * blocks) * kQueries + warp * kTiles * 16 + g;  // this lane's first query

    Tile<T, kKeys16> next;
    next.load_from(head, 0, p.length);

    std::uint32_t q[kTiles][kHead / 16][4];
    float scale[kTiles][2];  // of rows g, g + 8
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::int64_t query = first_query + m * 16 + half * 8;
        float squares = 0;
#pragma unroll
        for (int step = 0; step < kHead / 16; ++step) {
          q[m][step][half] = q[m][step][half + 2] = 0;
          if (query < p.length) {
            const T* x = head.q + query * head.token + step * 16 + 2 * t;
            load_pair(x, q[m][step][half], squares);
            load_pair(x + 8, q[m][step][half + 2], squares);
          }
        }
        scale[m][half] = query_scale(squares, p.eps);
      }
    }

    float y[kTiles][kHead / 8][4] = {}, sums[kTiles][2] = {};
    for (std::int64_t first = 0; first < p.length; first += kKeys16) {
      __syncthreads();  // all threads have read the previous tile
      next.store_to(keys, values, first, p.length, p.eps);
      __syncthreads();
      if (first + kKeys16 < p.length) next.load_from(head, first + kKeys16, p.length);
      const int count = p.length - first < kKeys16 ? static_cast<int>(p.length - first) : kKeys16;
      for (int chunk = 0; chunk < count; chunk += kChunk) {
        float scores[kTiles][kChunk / 8][4] = {};
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
          for (int part = 0; part < kHead / 32; ++part) {
            std::uint32_t b[4];
            load_matrices(b, &keys[chunk + n * 8 + lane % 8][part * 32 + lane / 8 * 8]);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              multiply_add<T>(scores[m][n], q[m][2 * part], b[0], b[1]);
              multiply_add<T>(scores[m][n], q[m][2 * part + 1], b[2], b[3]);
            }
          }
        }
        // A lane holds the same elements of the scores (operand C) as it needs of the exponentials (operand A).
        std::uint32_t weights[kTiles][kChunk / 16][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int n = 0; n < kChunk / 8; ++n) {
            float e[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const bool inside = chunk + n * 8 + 2 * t + i % 2 < count;
              e[i] = inside ? exp2_approximate(scores[m][n][i] * scale[m][i / 2]) : 0.0f;
            }
            sums[m][0] += e[0] + e[1];
            sums[m][1] += e[2] + e[3];
            weights[m][n / 2][n % 2 * 2] = pack<T>(e[0], e[1]);
            weights[m][n / 2][n % 2 * 2 + 1] = pack<T>(e[2], e[3]);
          }
        }
#pragma unroll
        for (int step = 0; step < kChunk / 16; ++step) {
#pragma unroll
          for (int n = 0; n < kHead / 8; n += 2) {
            std::uint32_t b[4];
            load_matrices_transposed(b, &values[chunk + step * 16 + lane % 16][n * 8 + lane / 16 * 8]);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              multiply_add<T>(y[m][n], weights[m][step], b[0], b[1]);
              multiply_add<T>(y[m][n + 1], weights[m][step], b[2], b[3]);
            }
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float inverse = __fdividef(1.0f, group_sum(sums[m][half], 4));
        const std::int64_t query = first_query + m * 16 + half * 8;
        if (query < p.length) {
          auto* out = reinterpret_cast<std::uint32_t*>(head.y + query * head.out_token);
#pragma unroll
          for (int n = 0; n < kHead / 8; ++n) out[n * 4 + t] = pack<T>(y[m][n][2 * half] * inverse, y[m][n][2 * half + 1] * inverse);
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
constexpr int kStrideK32 = kHead + 16, kStrideV32 = kHead + 4;  // no bank conflicts for the way the rows are read

__global__ void __launch_bounds__(kBlock) attention_float32(const Params<float> p) {
  alignas(16) __shared__ float keys[kKeys32][kStrideK32];
  alignas(16) __shared__ float values[kKeys32][kStrideV32];
  constexpr int kQueries = kWarps * 16;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t blocks = ceil_div(p.length, kQueries);
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.heads * blocks; unit += gridDim.x) {
    const std::int64_t index = quotient(unit, blocks);
    const Head<float> head(p, index);
    const std::int64_t first_query = (unit - index * blocks) * kQueries + warp * 16 + g;  // this lane's first query

    Tile<float, kKeys32> next;
    next.load_from(head, 0, p.length);

    Vector<float, 4> q[2][kHead / 16];  // of rows g, g + 8
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t query = first_query + half * 8;
      float squares = 0;
#pragma unroll
      for (int s = 0; s < kHead / 16; ++s) {
        q[half][s] = {};
        if (query < p.length) q[half][s] = load<4>(head.q + query * head.token, s * 4 + t);
        squares += sum_of_squares(q[half][s]);
      }
      scale[half] = query_scale(squares, p.eps);
    }

    float y[kHead / 8][4] = {}, sums[2] = {};
    for (std::int64_t first = 0; first < p.length; first += kKeys32) {
      __syncthreads();  // all threads have read the previous tile
      next.store_to(keys, values, first, p.length, p.eps);
      __syncthreads();
      if (first + kKeys32 < p.length) next.load_from(head, first + kKeys32, p.length);
      const int count = p.length - first < kKeys32 ? static_cast<int>(p.length - first) : kKeys32;

      float scores[kKeys32 / 8][4] = {};
#pragma unroll
      for (int s = 0; s < kHead / 16; ++s) {
        const Vector<float, 4>&low = q[0][s], &high = q[1][s];
        const SplitA even(low[0], high[0], low[1], high[1]), odd(low[2], high[2], low[3], high[3]);
#pragma unroll
        for (int n = 0; n < kKeys32 / 8; ++n) {
          const Vector<float, 4> k = load<4>(keys[n * 8 + g], s * 4 + t);
          multiply_add_split(scores[n], even, Split(k[0]), Split(k[1]));
          multiply_add_split(scores[n], odd, Split(k[2]), Split(k[3]));
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys32 / 8; ++n) {
        if (n * 8 >= count) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool inside = n * 8 + 2 * t + i % 2 < count;
          scores[n][i] = inside ? exp2_approximate(scores[n][i] * scale[i / 2]) : 0.0f;
          sums[i / 2] += scores[n][i];
        }
        const SplitA weights(scores[n][0], scores[n][2], scores[n][1], scores[n][3]);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const Vector<float, 4> even = load<4>(values[n * 8 + 2 * t], part * 8 + g), odd = load<4>(values[n * 8 + 2 * t + 1], part * 8 + g);
#pragma unroll
          for (int i = 0; i < 4; ++i) multiply_add_split(y[part * 4 + i], weights, Split(even[i]), Split(odd[i]));
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = __fdividef(1.0f, group_sum(sums[half], 4));
      const std::int64_t query = first_query + half * 8;
      if (query < p.length) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {  // 2t, 2t + 1
            const auto four = vector_of<float, 4>([&](int i) { return y[part * 4 + i][half * 2 + column] * inverse; });
            store(head.y + query * head.out_token, part * 8 + 2 * t + column, four);
          }
        }
      }
    }
  }
}

// -- Any head size: 32 queries and kSlice result channels per block ----------------------------------------------------------------------
//
// Eight neighboring threads share a query; each has four of a tile's 32 keys and an eighth of the slice's channels. A running maximum keeps the exponentials
// finite for any head size.

constexpr int kQueriesAny = 32, kKeysAny = 32, kDepth = 32, kSlice = 64, kBlockAny = 256, kLanesAny = kBlockAny / kQueriesAny;

// Computes the normalization factors of 32 rows, four per warp.
template <typename T>
__device__ void norms(float (&factors)[kKeysAny], const T* x, std::int64_t first, const Params<T>& p, std::int64_t token) {
  for (int row = threadIdx.x / kWarp; row < kKeysAny; row += kBlockAny / kWarp) {
    float sum = 0;
    if (first + row < p.length) {
      for (std::int64_t c = threadIdx.x % kWarp; c < p.head_size; c += kWarp) {
        const float value = to_float(x[(first + row) * token + c]);
        sum += value * value;
      }
    }
    sum = group_sum(sum, kWarp);
    if (threadIdx.x % kWarp == 0) factors[row] = norm_factor(sum, 1.0f / static_cast<float>(p.head_size), p.eps);
  }
}

// Loads 32 rows by kColumns channels, and zeros outside of the tensor.
template <int kColumns, int kStride, typename T>
__device__ void load_tile(float (&tile)[kKeysAny][kStride], const T* x, std::int64_t first, std::int64_t channel, const Params<T>& p, std::int64_t token) {
  for (int i = threadIdx.x; i < kKeysAny * kColumns; i += kBlockAny) {
    const int row = i / kColumns, c = i % kColumns;
    tile[row][c] = first + row < p.length && channel + c < p.head_size ? to_float(x[(first + row) * token + channel + c]) : 0.0f;
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockAny) attention_any_size(const Params<T> p) {
  __shared__ float q[kQueriesAny][kDepth + 1], k[kKeysAny][kDepth + 1], v[kKeysAny][kSlice], weights[kQueriesAny][kKeysAny + 1];
  __shared__ float norm_q[kQueriesAny], norm_k[kKeysAny], norm_v[kKeysAny];
  const int row = threadIdx.x / kLanesAny, lane = threadIdx.x % kLanesAny;
  const std::int64_t blocks = ceil_div(p.length, kQueriesAny), slices = ceil_div(p.head_size, kSlice);
  const float temperature = 1.0f / sqrtf(static_cast<float>(p.head_size));
  for (std::int64_t unit = blockIdx.x; unit < p.samples * p.heads * blocks * slices; unit += gridDim.x) {
    const std::int64_t block = quotient(unit, slices), slice = (unit - block * slices) * kSlice, index = quotient(block, blocks);
    const Head<T> head(p, index);
    const std::int64_t first_query = (block - index * blocks) * kQueriesAny;
    __syncthreads();  // all threads have finished the previous unit
    norms(norm_q, head.q, first_query, p, head.token);

    float y[kSlice / kLanesAny] = {}, maximum = -INFINITY, sum = 0;
    for (std::int64_t first = 0; first < p.length; first += kKeysAny) {
      float scores[kKeysAny / kLanesAny] = {};
      for (std::int64_t channel = 0; channel < p.head_size; channel += kDepth) {
        __syncthreads();  // all threads have read the previous tiles
        load_tile<kDepth>(q, head.q, first_query, channel, p, head.token);
        load_tile<kDepth>(k, head.k, first, channel, p, head.token);
        if (channel == 0) {
          norms(norm_k, head.k, first, p, head.token);
          norms(norm_v, head.v, first, p, head.token);
          load_tile<kSlice>(v, head.v, first, slice, p, head.token);
        }
        __syncthreads();
        for (int c = 0; c < kDepth; ++c) {
#pragma unroll
          for (int j = 0; j < kKeysAny / kLanesAny; ++j) scores[j] += q[row][c] * k[lane + j * kLanesAny][c];
        }
      }

      float largest = maximum;
#pragma unroll
      for (int j = 0; j < kKeysAny / kLanesAny; ++j) {
        const int key = lane + j * kLanesAny;
        scores[j] = first + key < p.length ? scores[j] * (norm_q[row] * temperature * norm_k[key]) : -INFINITY;
        largest = fmaxf(largest, scores[j]);
      }
      for (int distance = kLanesAny / 2; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      const float correction = expf(maximum - largest);  // 0 for the first tile
      maximum = largest;
      sum *= correction;
#pragma unroll
      for (int j = 0; j < kKeysAny / kLanesAny; ++j) {
        const int key = lane + j * kLanesAny;
        const bool inside = first + key < p.length;
        const float e = inside ? expf(scores[j] - maximum) : 0.0f;
        sum += e;
        weights[row][key] = inside ? e * norm_v[key] : 0.0f;
      }
      __syncwarp();  // the eight threads of a query are in one warp
#pragma unroll
      for (int i = 0; i < kSlice / kLanesAny; ++i) {
        y[i] *= correction;
        for (int key = 0; key < kKeysAny; ++key) y[i] += weights[row][key] * v[key][lane + i * kLanesAny];
      }
    }

    const float inverse = __fdividef(1.0f, group_sum(sum, kLanesAny));
    if (first_query + row < p.length) {
#pragma unroll
      for (int i = 0; i < kSlice / kLanesAny; ++i) {
        const std::int64_t c = slice + lane + i * kLanesAny;
        if (c < p.head_size) head.y[(first_query + row) * head.out_token + c] = from_float<T>(y[i] * inverse);
      }
    }
  }
}

// With at least this many blocks of 128 queries the GPU is fully occupied. Then more queries per warp are faster: keys and values are read less often.
constexpr std::int64_t kManyBlocks = 256;

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  const std::int64_t heads = p.samples * p.heads;
  if (p.head_size != kHead || !aligned(16, p.qkv, p.y)) {
    return launch(attention_any_size<T>, grid_of(heads * ceil_div(p.length, kQueriesAny) * ceil_div(p.head_size, kSlice), 1), kBlockAny, stream, p);
  }
  const std::int64_t blocks = heads * ceil_div(p.length, 64), double_blocks = heads * ceil_div(p.length, 128);
  if constexpr (sizeof(T) == sizeof(float)) {
    return launch(attention_float32, grid_of(blocks, 1), kBlock, stream, p);
  } else if (p.length > 64 && double_blocks >= kManyBlocks) {
    return launch(attention_16bit<T, 2>, grid_of(double_blocks, 1), kBlock, stream, p);
  } else {
    return launch(attention_16bit<T, 1>, grid_of(blocks, 1), kBlock, stream, p);
  }
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::cosine_attention
