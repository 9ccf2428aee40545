// Shared code of the CUDA kernels: launches, vectors of elements, reductions over the lanes that hold a row.
//
// A kernel takes its operator's Params by value and loops over the work (grid-stride), so a grid of any size is correct. It is instantiated for the widest
// accesses, 16 bytes, and for single elements; the host chooses by pointer alignment and size (`wide`). An output may be written in place over an input:
// the thread, or the lanes, that store an output have loaded the inputs before. Therefore no pointer is __restrict__.
//
// tests/cuda_on_cpu compiles the same sources for the CPU. Everything that only nvcc accepts (launches, PTX) must be in this header or in common/ptx.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/math.h"
#include "common/ptx.h"

namespace scm {

constexpr int kThreads = 256;  // default block size
constexpr unsigned kWarp = 32;
constexpr std::int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// -- Host --------------------------------------------------------------------------------------------------------------------

// Returns null for success, or CUDA's message. Clears the error state then, so that a later cudaGetLastError() does not report `error`.
inline const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());
  return cudaGetErrorString(error);
}

// Launches a kernel with `shared_bytes` of dynamic shared memory. Returns null, or CUDA's error message.
template <typename... Parameters, typename... Arguments>
const char* launch_with_shared(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // more must be requested
    const char* const error = message_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    if (error) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return message_of(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Launches a kernel without dynamic shared memory. Returns null, or CUDA's error message.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, const Arguments&... arguments) {
  return launch_with_shared(kernel, grid, threads, 0, stream, arguments...);
}

// Returns a grid with enough blocks in x for `count` items, `per_block` items per block, and one row of blocks in y per sample, clamped to CUDA's limits.
// Kernels loop over the rest.
inline dim3 grid_of(std::int64_t count, std::int64_t per_block, std::int64_t samples = 1) {
  const std::int64_t blocks = ceil_div(count, per_block);
  return dim3(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX), static_cast<unsigned>(samples < kMaxGridY ? samples : kMaxGridY));
}

// Elements in an access of 16 bytes.
template <typename T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

// A null pointer, which marks an unused output, counts as aligned.
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

// kWidth elements, loaded or stored in one access. It holds words instead of elements: with elements, nvcc unpacks them into registers right after the load,
// which makes the thread wait for the load.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  using Word = std::conditional_t<sizeof(T) * kWidth < 4, std::uint16_t, std::uint32_t>;
  static constexpr int kBits = 8 * sizeof(T), kPerWord = sizeof(Word) / sizeof(T);
  Word words[kWidth / kPerWord];

  __device__ __forceinline__ float operator[](int i) const { return to_float(from_bits<T>(words[i / kPerWord] >> (i % kPerWord * kBits))); }
};

// Returns the vector of the elements make(i), each rounded to T.
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

// Returns the sum of x over a group of `lanes` neighboring lanes; `lanes` is a power of two up to 32. All lanes of the warp must call it together.
__device__ __forceinline__ float group_sum(float x, unsigned lanes) {
  for (unsigned distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, static_cast<int>(distance));
  return x;
}

// Same as inverse_norm in common/math.h, with approximate square root and division.
__device__ __forceinline__ float norm_factor(float sum_of_squares, float inverse_channels, float eps) {
  return __fdividef(1.0f, eps + sqrt_approximate(sum_of_squares * inverse_channels));
}

// Returns a / b for a >= 0, b > 0. Uses a 32-bit division if both fit: a 64-bit division takes dozens of instructions.
__device__ __forceinline__ std::int64_t quotient(std::int64_t a, std::int64_t b) {
  return (static_cast<std::uint64_t>(a | b) >> 32) == 0 ? static_cast<std::int64_t>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b)) : a / b;
}

// Calls store(i, load(i)) for every i in [0, count), divided among the grid's blocks in x. Each thread issues kInFlight loads before the first store:
// fewer do not saturate the memory bandwidth.
constexpr int kInFlight = 2;
constexpr int kElementsPerBlock = kThreads * kInFlight;  // elements, or vectors, per block and iteration

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

// -- Row normalization: a group of lanes of one warp holds a row in registers, kVectors vectors per lane, so the row is read once ------

// Returns the number of lanes per row, a power of two, such that each lane holds at most `per_lane` vectors. It is a whole warp if with_row_shape chose more
// than two vectors per lane.
inline int lanes_per_row(std::int64_t vectors, int per_lane) {
  int lanes = 1;
  while (lanes < static_cast<int>(kWarp) && std::int64_t{lanes} * per_lane < vectors) lanes *= 2;
  return lanes;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls run(width, per_lane) with integral constants: elements per access and vectors per lane. per_lane is 0 for rows that do not fit into the registers of
// a warp and must be read twice.
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
