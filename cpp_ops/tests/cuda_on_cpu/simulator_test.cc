// Tests that the simulator detects errors in kernels. Some kernels here are wrong on purpose.
#include <gtest/gtest.h>

#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr int kBlock = 64;

void launch(void (*kernel)(int*), int* data) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kBlock);
  ASSERT_EQ(cudaLaunchKernelEx(&config, kernel, data), cudaSuccess);
}

std::vector<int> run(void (*kernel)(int*), bool reversed) {
  std::vector<int> data(kBlock);
  simulator::options = {};
  simulator::options.reversed = reversed;
  launch(kernel, data.data());
  simulator::options = {};
  return data;
}

template <bool kBarrier>
__global__ void reverse(int* data) {
  __shared__ int shared[kBlock];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  data[threadIdx.x] = shared[kBlock - 1 - threadIdx.x];
}

TEST(SimulatorTest, RunsThreadsUpToABarrier) {
  for (const bool reversed : {false, true}) {
    const std::vector<int> data = run(reverse<true>, reversed);
    for (int i = 0; i < kBlock; ++i) EXPECT_EQ(data[i], kBlock - 1 - i);
  }
}

TEST(SimulatorTest, ReversedOrderRevealsAMissingBarrier) { EXPECT_NE(run(reverse<false>, false), run(reverse<false>, true)); }

__global__ void shuffle(int* data) { data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 5); }

TEST(SimulatorTest, ShufflesWithinAWarp) {
  const std::vector<int> data = run(shuffle, false);
  for (int i = 0; i < kBlock; ++i) EXPECT_EQ(data[i], i ^ 5);
}

__global__ void barrier_of_some(int* data) {
  if (threadIdx.x < 40) __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void two_barriers(int* data) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  data[threadIdx.x] = 1;
}

__global__ void shuffle_of_some(int* data) {
  if (threadIdx.x % 32 < 16) data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

TEST(SimulatorDeathTest, RejectsBarriersThatNotAllThreadsReach) {
  EXPECT_DEATH(run(barrier_of_some, false), "barrier");
  EXPECT_DEATH(run(barrier_of_some, true), "barrier");
  EXPECT_DEATH(run(two_barriers, false), "another barrier");
}

TEST(SimulatorDeathTest, RejectsInstructionsOfAWarpThatNotAllLanesReach) {
  EXPECT_DEATH(run(shuffle_of_some, false), "instruction of its warp");
  EXPECT_DEATH(run(shuffle_of_some, true), "instruction of its warp");
}

TEST(SimulatorTest, RejectsGridsThatAGpuRefuses) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kBlock);
  int* data = nullptr;
  config.gridDim = dim3(0);
  EXPECT_EQ(cudaLaunchKernelEx(&config, shuffle, data), cudaErrorInvalidConfiguration);
  config.gridDim = dim3(1, 65536);
  EXPECT_EQ(cudaLaunchKernelEx(&config, shuffle, data), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

}  // namespace
