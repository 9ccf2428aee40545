// Replaces the CUDA Toolkit's cuda_runtime.h: the functions that the kernels in src use, implemented with simulator.h. Arithmetic intrinsics call <cmath>, which
// is more accurate than a GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <type_traits>
#include <utility>

#include "simulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

// -- Launches ----------------------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t& last_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t cudaGetLastError() { return std::exchange(last_error(), cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "unspecified launch failure";
  }
}

// The kernels that may use more than 48 KiB of dynamic shared memory, and how much. Hopper has 227 KiB.
inline std::map<const void*, int>& shared_memory_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > 227 * 1024) return last_error() = cudaErrorInvalidValue;
  shared_memory_limits()[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z != 1) return last_error() = cudaErrorInvalidConfiguration;
  const auto limit = shared_memory_limits().find(reinterpret_cast<const void*>(kernel));
  if (config->dynamicSmemBytes > static_cast<std::size_t>(limit == shared_memory_limits().end() ? 48 * 1024 : limit->second)) {
    return last_error() = cudaErrorInvalidValue;
  }
  if (simulator::options.refuse_launches) return last_error() = cudaErrorLaunchFailure;
  simulator::run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// -- Device and memory: an A100, whose memory is the host's ------------------------------------------------------------------

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };

inline const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 108 : attribute == cudaDevAttrComputeCapabilityMajor ? simulator::options.major_capability : 0;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// -- Barriers and shuffles -----------------------------------------------------------------------------------------------------

inline void __syncthreads(int site = __builtin_LINE()) { simulator::block_barrier(site); }

inline int __syncthreads_or(int value, int site = __builtin_LINE()) { return simulator::block_or(site, value != 0); }

inline void __threadfence() {}  // blocks run one after another

// Returns the old value and stores the next one; 0 follows `limit`.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

inline void __syncwarp(int site = __builtin_LINE()) {
  simulator::warp_instruction(site, nullptr, [](void* const*) {});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int site = __builtin_LINE()) {
  struct Lane {
    T value, result;
    int lane_mask;
  };
  if (mask != 0xffffffffu) simulator::fail("shuffles with a part of its warp, which the simulator does not support");
  Lane self{value, {}, lane_mask};
  simulator::warp_instruction(site, &self, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = static_cast<Lane*>(lanes[i ^ lane.lane_mask])->value;
    }
  });
  return self.result;
}

// -- Arithmetic ----------------------------------------------------------------------------------------------------------------

inline std::uint32_t __float_as_uint(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float normcdff(float x) { return static_cast<float>(std::erfc(-x / std::sqrt(2.0)) / 2); }
inline float __fmul_rn(float x, float y) { return x * y; }
