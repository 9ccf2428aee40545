#include "runtime.h"

#include <cstring>
#include <mutex>
#include <utility>

namespace stub {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

CUcontext primary_context(int device) {
  static std::mutex mutex;
  static CUcontext contexts[8];
  const std::lock_guard lock(mutex);
  if (contexts[device] == nullptr) cuDevicePrimaryCtxRetain(&contexts[device], device);
  return contexts[device];
}

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

void initialize() {
  CUcontext context = nullptr;
  cuCtxGetCurrent(&context);
  if (context == nullptr) cuCtxSetCurrent(primary_context(0));
}

cudaError_t result_of(CUresult result) {
  const auto error = static_cast<cudaError_t>(result);  // the codes are the same
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace stub

using stub::address;
using stub::initialize;
using stub::result_of;

// -- Devices and errors ---------------------------------------------------------

STUB_RUNTIME(cudaDriverGetVersion)(int* version) { return result_of(cuDriverGetVersion(version)); }
STUB_RUNTIME(cudaRuntimeGetVersion)(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
STUB_RUNTIME(cudaGetDeviceCount)(int* count) { return result_of(cuDeviceGetCount(count)); }
STUB_RUNTIME(cudaGetDevice)(int* device) {
  initialize();
  return result_of(cuCtxGetDevice(device));
}
STUB_RUNTIME(cudaSetDevice)(int device) {
  int count = 0;
  cuDeviceGetCount(&count);
  if (device < 0 || device >= count) return result_of(CUDA_ERROR_INVALID_DEVICE);
  return result_of(cuCtxSetCurrent(stub::primary_context(device)));
}
STUB_RUNTIME(cudaDeviceSynchronize)() {
  initialize();
  return result_of(cuCtxSynchronize());
}
STUB_RUNTIME(cudaDeviceGetAttribute)(int* value, cudaDeviceAttr attribute, int device) {
  return result_of(cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(attribute), device));
}
STUB_RUNTIME(cudaGetDeviceProperties)(cudaDeviceProp* properties, int device) {
  const auto attribute = [&](CUdevice_attribute name) {
    int value = 0;
    cuDeviceGetAttribute(&value, name, device);
    return value;
  };
  *properties = {};
  if (const CUresult error = cuDeviceGetName(properties->name, sizeof properties->name, device)) return result_of(error);
  cuDeviceGetUuid_v2(reinterpret_cast<CUuuid*>(&properties->uuid), device);
  cuDeviceTotalMem_v2(&properties->totalGlobalMem, device);
  properties->major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  properties->minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  properties->multiProcessorCount = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  properties->warpSize = attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  properties->maxThreadsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  properties->maxThreadsPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  properties->maxBlocksPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  for (int i = 0; i < 3; ++i) {
    properties->maxThreadsDim[i] = attribute(static_cast<CUdevice_attribute>(CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i));
    properties->maxGridSize[i] = attribute(static_cast<CUdevice_attribute>(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i));
  }
  properties->sharedMemPerBlock = static_cast<size_t>(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK));
  properties->sharedMemPerBlockOptin = static_cast<size_t>(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR));
  properties->reservedSharedMemPerBlock = static_cast<size_t>(attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK));
  properties->regsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  properties->regsPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
  properties->totalConstMem = static_cast<size_t>(attribute(CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY));
  properties->l2CacheSize = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  properties->persistingL2CacheMaxSize = attribute(CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE);
  properties->memoryBusWidth = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  properties->asyncEngineCount = attribute(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
  properties->canMapHostMemory = properties->concurrentKernels = properties->unifiedAddressing = properties->managedMemory = 1;
  properties->cooperativeLaunch = properties->memoryPoolsSupported = properties->streamPrioritiesSupported = 1;
  properties->clusterLaunch = attribute(CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH);
  return cudaSuccess;
}
STUB_RUNTIME(cudaGetLastError)() { return std::exchange(stub::last_error, cudaSuccess); }
STUB_RUNTIME(cudaPeekAtLastError)() { return stub::last_error; }
STUB_EXPORT const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
  const char* name = nullptr;
  return cuGetErrorName(static_cast<CUresult>(error), &name) == CUDA_SUCCESS ? name : "cudaErrorUnknown";
}
STUB_EXPORT const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  const char* text = nullptr;
  return cuGetErrorString(static_cast<CUresult>(error), &text) == CUDA_SUCCESS ? text : "unknown error";
}
STUB_RUNTIME(cudaGetDriverEntryPointByVersion)
(const char* name, void** function, unsigned version, unsigned long long flags, cudaDriverEntryPointQueryResult* status) {
  CUdriverProcAddressQueryResult found{};
  const CUresult result = cuGetProcAddress_v2(name, function, static_cast<int>(version), flags, &found);
  if (status != nullptr) *status = static_cast<cudaDriverEntryPointQueryResult>(found);
  return result_of(result);
}

// -- Memory -----------------------------------------------------------------------

STUB_RUNTIME(cudaMalloc)(void** pointer, size_t bytes) {
  initialize();
  *pointer = nullptr;
  return bytes == 0 ? cudaSuccess : result_of(cuMemAlloc_v2(reinterpret_cast<CUdeviceptr*>(pointer), bytes));
}
STUB_RUNTIME(cudaFree)(void* pointer) {
  initialize();
  return result_of(cuMemFree_v2(address(pointer)));
}
STUB_RUNTIME(cudaHostAlloc)(void** pointer, size_t bytes, unsigned flags) {
  initialize();
  return result_of(cuMemHostAlloc(pointer, bytes, flags));
}
STUB_RUNTIME(cudaMallocHost)(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
STUB_RUNTIME(cudaFreeHost)(void* pointer) { return result_of(cuMemFreeHost(pointer)); }
STUB_RUNTIME(cudaMallocAsync)(void** pointer, size_t bytes, cudaStream_t stream) {
  initialize();
  return result_of(cuMemAllocAsync(reinterpret_cast<CUdeviceptr*>(pointer), bytes, stream));
}
STUB_RUNTIME(cudaFreeAsync)(void* pointer, cudaStream_t stream) { return result_of(cuMemFreeAsync(address(pointer), stream)); }
STUB_RUNTIME(cudaMemGetInfo)(size_t* free, size_t* total) {
  initialize();
  return result_of(cuMemGetInfo_v2(free, total));
}
STUB_RUNTIME(cudaMemcpy)(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  initialize();
  return result_of(cuMemcpy(address(to), address(from), bytes));
}
STUB_RUNTIME(cudaMemcpyAsync)(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  initialize();
  return result_of(cuMemcpyAsync(address(to), address(from), bytes, stream));
}
STUB_RUNTIME(cudaMemcpy2DAsync)
(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  initialize();
  CUDA_MEMCPY2D copy{};
  copy.srcMemoryType = copy.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  copy.srcDevice = address(from);
  copy.srcPitch = from_pitch;
  copy.dstDevice = address(to);
  copy.dstPitch = to_pitch;
  copy.WidthInBytes = width;
  copy.Height = height;
  return result_of(cuMemcpy2DAsync_v2(&copy, stream));
}
STUB_RUNTIME(cudaMemcpyFromSymbol)(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  initialize();
  const CUdeviceptr from = stub::variable_of(symbol);
  if (from == 0) return stub::last_error = cudaErrorInvalidSymbol;
  return result_of(cuMemcpy(address(to), from + offset, bytes));
}
STUB_RUNTIME(cudaMemset)(void* pointer, int value, size_t bytes) {
  initialize();
  return result_of(cuMemsetD8_v2(address(pointer), static_cast<unsigned char>(value), bytes));
}
STUB_RUNTIME(cudaMemsetAsync)(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  initialize();
  return result_of(cuMemsetD8Async(address(pointer), static_cast<unsigned char>(value), bytes, stream));
}
STUB_RUNTIME(cudaPointerGetAttributes)(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {};
  unsigned type = 0;
  if (cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address(pointer)) != CUDA_SUCCESS) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;
    return cudaSuccess;
  }
  cuPointerGetAttribute(&attributes->device, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address(pointer));
  attributes->type = type == CU_MEMORYTYPE_DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->devicePointer = const_cast<void*>(pointer);
  attributes->hostPointer = type == CU_MEMORYTYPE_HOST ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}
