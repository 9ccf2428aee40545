// Fat binaries register their kernels and variables here; nvcc's <<<>>> launches through these functions.
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "runtime.h"

extern "C" CUkernel scm_stub_kernel(CUlibrary library, const char* name);

namespace stub {
namespace {

struct Variable {
  CUlibrary library;
  const char* name;
  CUdeviceptr address;  // 0 until it is asked for
};

struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, CUkernel> kernels;
  std::map<const void*, Variable> variables;
};

Registry& registry() {
  static auto* const registry = new Registry;
  return *registry;
}

struct Configuration {  // of the launch that is being prepared
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  initialize();
  return result_of(
      cuLaunchKernel(kernel_of(kernel), grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared), stream, nullptr, nullptr));
}

CUlibrary library_of(void** handle) { return static_cast<CUlibrary>(*handle); }

}  // namespace

CUfunction kernel_of(const void* host) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().kernels.find(host);
  return found != registry().kernels.end() ? reinterpret_cast<CUfunction>(found->second) : static_cast<CUfunction>(const_cast<void*>(host));
}

CUdeviceptr variable_of(const void* host) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().variables.find(host);
  if (found == registry().variables.end()) return 0;
  Variable& variable = found->second;
  if (variable.address == 0) cuLibraryGetGlobal(&variable.address, nullptr, variable.library, variable.name);
  return variable.address;
}

}  // namespace stub

using stub::configurations;
using stub::registry;

STUB_EXPORT void** __cudaRegisterFatBinary(void* image) {
  auto** handle = new void*;
  cuLibraryLoadData(reinterpret_cast<CUlibrary*>(handle), image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  return handle;
}
STUB_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
STUB_EXPORT void __cudaUnregisterFatBinary(void**) {}
STUB_EXPORT void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  const CUkernel kernel = scm_stub_kernel(stub::library_of(handle), name);
  const std::lock_guard lock(registry().mutex);
  registry().kernels[host] = kernel;
}
STUB_EXPORT void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  const std::lock_guard lock(registry().mutex);
  registry().variables[host] = {stub::library_of(handle), name, 0};
}
STUB_EXPORT void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

STUB_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, static_cast<cudaStream_t>(stream)});
  return 0;
}
STUB_RUNTIME(__cudaPopCallConfiguration)(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return cudaErrorMissingConfiguration;
  *grid = configurations.back().grid;
  *block = configurations.back().block;
  *shared = configurations.back().shared;
  *static_cast<cudaStream_t*>(stream) = configurations.back().stream;
  configurations.pop_back();
  return cudaSuccess;
}
STUB_RUNTIME(__cudaGetKernel)(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(stub::kernel_of(host));
  return cudaSuccess;
}
STUB_RUNTIME(cudaGetKernel)(cudaKernel_t* kernel, const void* host) { return __cudaGetKernel(kernel, host); }
STUB_RUNTIME(__cudaLaunchKernel)(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return stub::launch(kernel, grid, block, shared, stream);
}
STUB_RUNTIME(cudaLaunchKernel)(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return stub::launch(kernel, grid, block, shared, stream);
}
STUB_RUNTIME(cudaLaunchKernelExC)(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return stub::launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
STUB_RUNTIME(cudaFuncSetAttribute)(const void* kernel, cudaFuncAttribute attribute, int value) {
  stub::initialize();
  return stub::result_of(cuFuncSetAttribute(stub::kernel_of(kernel), static_cast<CUfunction_attribute>(attribute), value));
}
STUB_RUNTIME(cudaFuncGetAttributes)(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  const CUfunction function = stub::kernel_of(kernel);
  cuFuncGetAttribute(&attributes->maxThreadsPerBlock, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function);
  cuFuncGetAttribute(&attributes->numRegs, CU_FUNC_ATTRIBUTE_NUM_REGS, function);
  cuFuncGetAttribute(&attributes->ptxVersion, CU_FUNC_ATTRIBUTE_PTX_VERSION, function);
  cuFuncGetAttribute(&attributes->binaryVersion, CU_FUNC_ATTRIBUTE_BINARY_VERSION, function);
  cuFuncGetAttribute(&attributes->maxDynamicSharedSizeBytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, function);
  return cudaSuccess;
}
STUB_RUNTIME(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)(int* blocks, const void* kernel, int threads, size_t shared, unsigned flags) {
  return stub::result_of(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub::kernel_of(kernel), threads, shared, flags));
}
STUB_RUNTIME(cudaOccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, const void* kernel, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}
