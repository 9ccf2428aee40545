// Tests that the simulator detects errors in kernels. Some kernels here are wrong on purpose.
#include <gtest/gtest.h>

#include <vector>

#include "common/ptx.h"
#include "cuda_runtime.h"

namespace {

constexpr int kBlock = 64;

void launch(void (*kernel)(int*), int* data) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = 16 * 1024;
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

enum class Wait { none, early, late };

// Each thread copies four numbers to shared memory, in a group of its own, and reads its neighbor's.
template <Wait kWait>
__global__ void copy_async(int* data) {
  alignas(16) static const int numbers[4] = {1, 2, 3, 4};
  auto* const shared = reinterpret_cast<int*>(scm::dynamic_shared_memory());
  scm::start_copy(shared + threadIdx.x * 4, numbers, threadIdx.x % 3 != 0);
  scm::commit_copies();
  scm::commit_copies();
  if (kWait == Wait::early) scm::wait_for_copies<1>();
  __syncthreads();
  data[threadIdx.x] = shared[(kBlock - 1 - threadIdx.x) * 4 + 3];
  if (kWait != Wait::none) scm::wait_for_copies<0>();
}

TEST(SimulatorTest, CopiesAreThereAfterAWaitAndABarrier) {
  for (const bool reversed : {false, true}) {
    const std::vector<int> data = run(copy_async<Wait::early>, reversed);
    for (int i = 0; i < kBlock; ++i) EXPECT_EQ(data[i], (kBlock - 1 - i) % 3 == 0 ? 0 : 4);
  }
  EXPECT_NE(run(copy_async<Wait::late>, false), run(copy_async<Wait::late>, true));
}

TEST(SimulatorDeathTest, RejectsCopiesThatNobodyWaitsFor) { EXPECT_DEATH(run(copy_async<Wait::none>, false), "before its copies are finished"); }

template <bool kPublishCopies, bool kPublishSums>
__global__ void products(int*) {
  alignas(16) static const int zeros[4] = {};
  unsigned char* const shared = scm::dynamic_shared_memory();
  for (int i = 0; i < 16; ++i) scm::start_copy(shared + (i * kBlock + threadIdx.x) * 16, zeros, true);
  scm::commit_copies();
  scm::wait_for_copies<0>();
  if (kPublishCopies) scm::publish_shared_memory();
  __syncthreads();
  float sums[8][4] = {};
  if (kPublishSums) scm::publish_sums();
  scm::start_multiply_add<scm::float16>(sums, scm::matrix_descriptor(shared), scm::matrix_descriptor(shared + 8192));
  scm::commit_products();
  scm::wait_for_products<0>();
}

TEST(SimulatorDeathTest, RejectsProductsWithoutTheirFences) {
  run(products<true, true>, false);
  EXPECT_DEATH(run(products<false, true>, false), "before its copies are published");
  EXPECT_DEATH(run(products<true, false>, true), "before its sums are published");
}

TEST(SimulatorTest, CountsBankConflicts) {
  const auto kernel = [](int*) {
    std::uint32_t r[4];
    scm::load_matrices(r, scm::dynamic_shared_memory() + threadIdx.x % 32 * 144);
    scm::load_matrices(r, scm::dynamic_shared_memory() + threadIdx.x % 32 * 64);
  };
  const unsigned long before = simulator::bank_conflicts;
  run(kernel, false);
  EXPECT_EQ(simulator::bank_conflicts, before + 2 * 4);  // two warps, four matrices
}

// As on a GPU, a kernel must request more than 48 KiB, and there is a limit.
TEST(SimulatorTest, RejectsSharedMemoryThatWasNotRequested) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = 64 * 1024;
  int* data = nullptr;
  EXPECT_EQ(cudaLaunchKernelEx(&config, products<true, true>, data), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFuncSetAttribute(products<true, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFuncSetAttribute(products<true, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024), cudaSuccess);
  EXPECT_EQ(cudaLaunchKernelEx(&config, products<true, true>, data), cudaSuccess);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
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
