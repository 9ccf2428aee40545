// What the CUDA kernels share: the launch, vectors of elements, sums over the lanes of a row.
//
// A kernel takes its operator's Params by value and loops until all is done, so that any grid covers any size. It is instantiated for the widest
// accesses, 16 bytes, and for single elements; the host chooses from the pointers and the sizes (`wide`). Inputs that an output may be written over
// are loaded before the output is stored, by the same thread or the same lanes; no pointer is __restrict__.
//
// tests/cuda_on_cpu compiles the same sources for the CPU: what only nvcc understands (launches, PTX) stays in this header and in common/ptx.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/math.h"
#include "common/ptx.h"

namespace scm {

constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise
constexpr unsigned kWarp = 32;
constexpr std::int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// -- Host --------------------------------------------------------------------------------------------------------------------

// Launches and returns null, or what CUDA says is wrong. The error is taken back: whoever launches next must not find it.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());
  return cudaGetErrorString(error);
}

// Blocks for `count` things, `per_block` to a block; y for samples. Kernels loop over what a grid of the greatest size leaves.
inline dim3 grid_of(std::int64_t count, std::int64_t per_block, std::int64_t samples = 1) {
  const std::int64_t blocks = ceil_div(count, per_block);
  return dim3(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX), static_cast<unsigned>(samples < kMaxGridY ? samples : kMaxGridY));
}

template <typename T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

// Null counts as aligned: an output that nobody reads.
template <typename... Pointers>
bool aligned(std::uintptr_t bytes, Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % bytes == 0) && ...);
}

// -- Device ------------------------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T from_bits(std::uint32_t bits) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return float_of(bits);
  } else {
    return {static_cast<std::uint16_t>(bits)};
  }
}

__device__ __forceinline__ std::uint32_t to_bits(float x) { return bits_of(x); }
__device__ __forceinline__ std::uint32_t to_bits(float16 x) { return x.bits; }
__device__ __forceinline__ std::uint32_t to_bits(bfloat16 x) { return x.bits; }

// One access of kWidth elements. It holds words: of elements, compilers make as many registers as soon as a load is issued, and wait for it.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  using Word = std::conditional_t<sizeof(T) * kWidth < 4, std::uint16_t, std::uint32_t>;
  static constexpr int kBits = 8 * sizeof(T), kPerWord = sizeof(Word) / sizeof(T);
  Word words[kWidth / kPerWord];

  __device__ __forceinline__ float operator[](int i) const { return to_float(from_bits<T>(words[i / kPerWord] >> (i % kPerWord * kBits))); }
};

// The vector of the elements make(i), rounded.
template <typename T, int kWidth, typename Make>
__device__ __forceinline__ Vector<T, kWidth> vector_of(const Make& make) {
  using V = Vector<T, kWidth>;
  V y;
#pragma unroll
  for (int word = 0; word < kWidth / V::kPerWord; ++word) {
    if constexpr (V::kPerWord == 2) {
      y.words[word] = pack<T>(make(2 * word), make(2 * word + 1));
    } else {
      y.words[word] = static_cast<typename V::Word>(to_bits(from_float<T>(make(word))));
    }
  }
  return y;
}

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load(const T* x, std::int64_t vector) {
  return reinterpret_cast<const Vector<T, kWidth>*>(x)[vector];
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(T* y, std::int64_t vector, const Vector<T, kWidth>& values) {
  reinterpret_cast<Vector<T, kWidth>*>(y)[vector] = values;
}

template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> activate(const Vector<T, kWidth>& x) {
  return vector_of<T, kWidth>([&](int i) { return activate(x[i]); });
}

template <typename T, int kWidth>
__device__ __forceinline__ float sum_of_squares(const Vector<T, kWidth>& x) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += x[i] * x[i];
  return sum;
}

// The sum over a group of `lanes` neighbours, a power of two up to a warp. Every lane of the warp must be here.
__device__ __forceinline__ float group_sum(float x, unsigned lanes) {
  for (unsigned distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, static_cast<int>(distance));
  return x;
}

// The factor of a pixel norm, as inverse_norm in common/math.h, but without the steps that make a root and a quotient exact to the last bit.
__device__ __forceinline__ float norm_factor(float sum_of_squares, float inverse_channels, float eps) {
  return __fdividef(1.0f, eps + sqrt_approximate(sum_of_squares * inverse_channels));
}

// A 64-bit division takes dozens of instructions, and most numbers are small.
__device__ __forceinline__ std::int64_t quotient(std::int64_t a, std::int64_t b) {
  return (static_cast<std::uint64_t>(a | b) >> 32) == 0 ? static_cast<std::int64_t>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b)) : a / b;
}

// Calls store(i, load(i)) for every i in [0, count), shared among the blocks of the grid's x. A thread has kInFlight loads on the way at once: it takes
// that to fill the memory's bandwidth.
constexpr int kInFlight = 2;
constexpr int kElementsPerBlock = kThreads * kInFlight;  // of a block, at a time

template <typename Load, typename Store>
__device__ __forceinline__ void for_each(std::int64_t count, Load load, Store store) {
  for (std::int64_t first = std::int64_t{blockIdx.x} * kElementsPerBlock + threadIdx.x; first < count; first += std::int64_t{gridDim.x} * kElementsPerBlock) {
    decltype(load(first)) loaded[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j * kThreads < count) loaded[j] = load(first + j * kThreads);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j * kThreads < count) store(first + j * kThreads, loaded[j]);
    }
  }
}

// -- Rows to norm: a row belongs to a group of lanes of one warp, kVectors vectors a lane, all in registers: read once ---------------

// How many lanes a row takes, a power of two, so that each has about kVectors vectors of it; a whole warp if with_row_shape chose more than two.
inline int lanes_per_row(std::int64_t vectors, int per_lane) {
  int lanes = 1;
  while (lanes < static_cast<int>(kWarp) && std::int64_t{lanes} * per_lane < vectors) lanes *= 2;
  return lanes;
}

// Calls run(width, per_lane) with integral constants: the width of the accesses, and the vectors that a lane holds, or 0 for rows that no warp can hold,
// which are read twice.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <typename T, typename Run>
const char* with_row_shape(std::int64_t channels, bool wide, const Run& run) {
  if (!wide) return channels <= 4 * kWarp ? run(Constant<1>{}, Constant<4>{}) : run(Constant<1>{}, Constant<0>{});
  constexpr Constant<kVectorWidth<T>> width;
  const std::int64_t vectors = channels / width.value;
  if (vectors <= 2 * kWarp) return run(width, Constant<2>{});
  if (vectors <= 4 * kWarp) return run(width, Constant<4>{});
  if (vectors <= 8 * kWarp) return run(width, Constant<8>{});
  if (vectors <= 16 * kWarp) return run(width, Constant<16>{});
  return run(width, Constant<0>{});
}

}  // namespace scm
