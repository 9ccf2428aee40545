// Memory of the devices, pinned memory, pools, and what the driver tells about an address.
#include <array>
#include <cstdint>

#include "devices.h"
#include "memory.h"
#include "streams.h"

// The driver's opaque type. A pool allocates like the device itself.
struct CUmemPoolHandle_st {
  std::array<cuuint64_t, 32> attributes{};  // by CUmemPool_attribute
};

namespace stub {
namespace {

CUmemPoolHandle_st default_pools[kMaxDevices];

CUresult allocate(Region& region, size_t limit, void** address, size_t bytes) {
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *address = region.allocate(bytes, limit);
  say(*address != nullptr ? "alloc" : "alloc FAILED", "%s %zu of %zu in use", region.name(), bytes, region.in_use());
  return *address != nullptr ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult allocate_on_device(CUdeviceptr* address, size_t bytes, int device) {
  void* block = nullptr;
  const CUresult result = allocate(device_memory(device), total_memory(), &block, bytes);
  *address = reinterpret_cast<CUdeviceptr>(block);
  return result;
}

CUresult allocate_async(CUdeviceptr* address, size_t bytes, CUstream handle, const char* function) {
  const CUstream_st* stream = stream_of(handle);
  if (stream->capture != nullptr) say("UNSAFE?", "%s in a capture: a node of the graph, which the stub does not make", function);
  return allocate_on_device(address, bytes, stream->device);
}

CUresult free_block(void* address) {
  if (address == nullptr) return CUDA_SUCCESS;
  Region* region = region_of(address);
  if (region == nullptr) return CUDA_ERROR_INVALID_VALUE;
  say("free", "%s", region->name());
  return region->free(address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult read_attribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  void* pointer = reinterpret_cast<void*>(address);
  Region* region = region_of(pointer);
  const Block* block = region == nullptr ? nullptr : region->find(pointer);
  const bool known = block != nullptr, pinned = known && region == &pinned_memory();
  const int device = known && !pinned ? device_of(pointer) : 0;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(value) = known ? primary_context(device) : nullptr; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *static_cast<unsigned*>(value) = !known ? 0 : pinned ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(value) = known ? address : 0; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *static_cast<void**>(value) = pinned ? pointer : nullptr; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(value) = known ? device : -2; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *static_cast<CUdeviceptr*>(value) = known ? reinterpret_cast<CUdeviceptr>(block->start) : 0; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(value) = known ? block->size : 0; break;
    case CU_POINTER_ATTRIBUTE_MAPPED: *static_cast<unsigned char*>(value) = known; break;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: *static_cast<void**>(value) = nullptr; break;
    default: *static_cast<unsigned*>(value) = 0;
  }
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// The first four attributes of a pool are int, the others 64 bits wide.
bool is_int(CUmemPool_attribute attribute) { return attribute <= CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES; }

}  // namespace
}  // namespace stub

using stub::current_device;

STUB_API(cuMemGetInfo_v2)(size_t* free, size_t* total) {
  *total = stub::total_memory();
  *free = *total - stub::device_memory(current_device()).in_use();
  return CUDA_SUCCESS;
}
STUB_API(cuMemAlloc_v2)(CUdeviceptr* address, size_t bytes) {
  STUB_FAIL_IF_ORDERED();
  STUB_FAIL_IF_FORBIDDEN();
  return stub::allocate_on_device(address, bytes, current_device());
}
STUB_API(cuMemFree_v2)(CUdeviceptr address) {
  if (address != 0) STUB_FAIL_IF_FORBIDDEN();
  return stub::free_block(reinterpret_cast<void*>(address));
}
STUB_API(cuMemHostAlloc)(void** address, size_t bytes, unsigned) {
  STUB_FAIL_IF_ORDERED();
  STUB_FAIL_IF_FORBIDDEN();
  return stub::allocate(stub::pinned_memory(), stub::kUnlimited, address, bytes);
}
STUB_API(cuMemAllocHost_v2)(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }
STUB_API(cuMemFreeHost)(void* address) {
  if (address != nullptr) STUB_FAIL_IF_FORBIDDEN();
  return stub::free_block(address);
}
STUB_API(cuMemHostGetDevicePointer_v2)(CUdeviceptr* device, void* host, unsigned) {
  *device = reinterpret_cast<CUdeviceptr>(host);
  return CUDA_SUCCESS;
}
STUB_API(cuMemGetAddressRange_v2)(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  const auto* pointer = reinterpret_cast<const void*>(address);
  const stub::Region* region = stub::region_of(pointer);
  const stub::Block* block = region == nullptr ? nullptr : region->find(pointer);
  if (block == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (base != nullptr) *base = reinterpret_cast<CUdeviceptr>(block->start);
  if (size != nullptr) *size = block->size;
  return CUDA_SUCCESS;
}
STUB_API(cuPointerGetAttribute)(void* value, CUpointer_attribute attribute, CUdeviceptr address) { return stub::read_attribute(value, attribute, address); }
STUB_API(cuPointerGetAttributes)(unsigned count, CUpointer_attribute* attributes, void** values, CUdeviceptr address) {
  for (unsigned i = 0; i < count; ++i) stub::read_attribute(values[i], attributes[i], address);
  return CUDA_SUCCESS;
}

STUB_API(cuDeviceGetDefaultMemPool)(CUmemoryPool* pool, CUdevice device) {
  *pool = &stub::default_pools[device];
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceGetMemPool)(CUmemoryPool* pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
STUB_API(cuMemPoolCreate)(CUmemoryPool* pool, const CUmemPoolProps*) {
  STUB_FAIL_IF_ORDERED();
  *pool = new CUmemPoolHandle_st;
  return CUDA_SUCCESS;
}
STUB_API(cuMemPoolDestroy)(CUmemoryPool) { return CUDA_SUCCESS; }
STUB_API(cuMemPoolTrimTo)(CUmemoryPool, size_t) { return CUDA_SUCCESS; }
STUB_API(cuMemPoolSetAccess)(CUmemoryPool, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
STUB_API(cuMemPoolSetAttribute)(CUmemoryPool pool, CUmemPool_attribute attribute, void* value) {
  if (attribute >= pool->attributes.size()) return CUDA_ERROR_INVALID_VALUE;
  pool->attributes[attribute] = stub::is_int(attribute) ? static_cast<cuuint64_t>(*static_cast<int*>(value)) : *static_cast<cuuint64_t*>(value);
  return CUDA_SUCCESS;
}
STUB_API(cuMemPoolGetAttribute)(CUmemoryPool pool, CUmemPool_attribute attribute, void* value) {
  if (attribute >= pool->attributes.size()) return CUDA_ERROR_INVALID_VALUE;
  if (stub::is_int(attribute)) {
    *static_cast<int*>(value) = static_cast<int>(pool->attributes[attribute]);
  } else {
    *static_cast<cuuint64_t*>(value) = pool->attributes[attribute];
  }
  return CUDA_SUCCESS;
}
STUB_API(cuMemAllocFromPoolAsync)(CUdeviceptr* address, size_t bytes, CUmemoryPool, CUstream stream) {
  STUB_FAIL_IF_ORDERED();
  return stub::allocate_async(address, bytes, stream, __func__);
}
STUB_API(cuMemAllocAsync)(CUdeviceptr* address, size_t bytes, CUstream stream) {
  STUB_FAIL_IF_ORDERED();
  return stub::allocate_async(address, bytes, stream, __func__);
}
STUB_API(cuMemFreeAsync)(CUdeviceptr address, CUstream) { return stub::free_block(reinterpret_cast<void*>(address)); }
