#include "devices.h"

#include <strings.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "memory.h"

namespace stub {
namespace {

// From NVIDIA's data sheets and deviceQuery.
constexpr Model kModels[] = {
    {"h200", "NVIDIA H200", 9, 0, 150109880320, 132, 233472, 232448, 1980000, 3201000, 6144, 62914560},
    {"a100", "NVIDIA A100-SXM4-80GB", 8, 0, 85094825984, 108, 167936, 166912, 1410000, 1593000, 5120, 41943040},
    {"v100", "Tesla V100-SXM2-16GB", 7, 0, 16945512448, 80, 98304, 98304, 1530000, 877000, 4096, 6291456},
    {"t4", "Tesla T4", 7, 5, 15828320256, 40, 65536, 65536, 1590000, 5001000, 256, 4194304},
    {"b200", "NVIDIA B200", 10, 0, 191503138816, 148, 233472, 232448, 1965000, 3996000, 8192, 132644864},
    {"rtx5090", "NVIDIA GeForce RTX 5090", 12, 0, 34190917632, 170, 102400, 101376, 2407000, 14001000, 512, 100663296},
};

}  // namespace

const Model& model() {
  static const Model& chosen = []() -> const Model& {
    const char* name = std::getenv("SCM_STUB_DEVICE");
    if (name == nullptr || *name == '\0') return kModels[0];
    for (const Model& model : kModels) {
      if (strcasecmp(model.setting, name) == 0) return model;
    }
    std::fprintf(stderr, "SCM_STUB_DEVICE must be h200, a100, v100, t4, b200 or rtx5090, got %s\n", name);
    std::abort();
  }();
  return chosen;
}

size_t total_memory() { return settings().memory != 0 ? settings().memory : model().memory; }

bool is_device(int device) { return device >= 0 && device < settings().device_count && device < kMaxDevices; }

}  // namespace stub

using stub::is_device;
using stub::model;

STUB_API(cuInit)(unsigned flags) {
  STUB_FAIL_IF_ORDERED();
  return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
STUB_API(cuDriverGetVersion)(int* version) {
  *version = stub::settings().driver_version;
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceGetCount)(int* count) {
  *count = stub::settings().device_count;
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceGet)(CUdevice* device, int ordinal) {
  if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceGetName)(char* name, int length, CUdevice) {
  std::snprintf(name, static_cast<size_t>(length), "%s", model().name);
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceGetUuid_v2)(CUuuid* uuid, CUdevice device) {
  std::memcpy(uuid->bytes, "scm-stub-device0", sizeof uuid->bytes);
  uuid->bytes[15] = static_cast<char>('0' + device);
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceTotalMem_v2)(size_t* bytes, CUdevice) {
  *bytes = stub::total_memory();
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceGetPCIBusId)(char* id, int length, CUdevice device) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return CUDA_SUCCESS;
}
STUB_API(cuDeviceCanAccessPeer)(int* can, CUdevice, CUdevice) {
  *can = 0;
  return CUDA_SUCCESS;
}

STUB_API(cuDeviceGetAttribute)(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  switch (static_cast<int>(attribute)) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = model().major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = model().minor; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = model().multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = model().shared_per_multiprocessor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = model().shared_per_block; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = model().clock_khz; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = model().memory_clock_khz; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = model().bus_bits; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = model().l2_bytes; break;
    case CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE: *value = model().l2_bytes / 8 * 5; break;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: *value = model().major >= 9; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = device + 1; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: *value = 2147483647; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    case CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT:
    case CU_DEVICE_ATTRIBUTE_SURFACE_ALIGNMENT: *value = 512; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 3; break;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_ECC_ENABLED:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
