#include "modules.h"

#include <algorithm>
#include <set>

#include "devices.h"
#include "memory.h"

namespace stub {
namespace {

constexpr size_t kVariableBytes = 65536;  // sizes of variables are in the image, which is not read

CUresult get_variable(CUmod_st* module, const char* name, CUdeviceptr* address, size_t* bytes) {
  const Lock lock(mutex());
  CUdeviceptr& found = module->variables[name];
  if (found == 0) found = reinterpret_cast<CUdeviceptr>(device_memory(current_device()).allocate(kVariableBytes, kUnlimited));
  if (address != nullptr) *address = found;
  if (bytes != nullptr) *bytes = kVariableBytes;
  return CUDA_SUCCESS;
}

CUfunc_st* function_of(CUkernel kernel) { return reinterpret_cast<CUfunc_st*>(kernel); }
CUmod_st* module_of(CUlibrary library) { return reinterpret_cast<CUmod_st*>(library); }

}  // namespace

CUmod_st* load_module(const void* image) {
  auto* module = new CUmod_st;
  module->runs_here = has_code(image, model().major, model().minor);
  return module;
}

CUfunc_st* get_function(CUmod_st* module, const char* name) {
  const Lock lock(mutex());
  auto& function = module->functions[name];
  if (function == nullptr) function.reset(new CUfunc_st{name, module});
  return function.get();
}

CUfunc_st* get_operation(const char* name) {
  static auto* const module = new CUmod_st;
  return get_function(module, name);
}

}  // namespace stub

using stub::function_of;
using stub::model;
using stub::module_of;

STUB_API(cuModuleLoadData)(CUmodule* module, const void* image) {
  *module = stub::load_module(image);
  return CUDA_SUCCESS;
}
STUB_API(cuModuleLoadDataEx)(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) { return cuModuleLoadData(module, image); }
STUB_API(cuModuleUnload)(CUmodule) { return CUDA_SUCCESS; }
STUB_API(cuModuleGetLoadingMode)(CUmoduleLoadingMode* mode) {
  *mode = CU_MODULE_LAZY_LOADING;
  return CUDA_SUCCESS;
}
STUB_API(cuModuleGetFunction)(CUfunction* function, CUmodule module, const char* name) {
  *function = stub::get_function(module, name);
  return CUDA_SUCCESS;
}
STUB_API(cuModuleGetGlobal_v2)(CUdeviceptr* address, size_t* bytes, CUmodule module, const char* name) {
  return stub::get_variable(module, name, address, bytes);
}
STUB_API(cuLibraryLoadData)(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*, void**, unsigned) {
  *library = reinterpret_cast<CUlibrary>(stub::load_module(code));
  return CUDA_SUCCESS;
}
STUB_API(cuLibraryUnload)(CUlibrary) { return CUDA_SUCCESS; }
STUB_API(cuLibraryGetKernel)(CUkernel* kernel, CUlibrary library, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(stub::get_function(module_of(library), name));
  return CUDA_SUCCESS;
}
STUB_API(cuLibraryGetModule)(CUmodule* module, CUlibrary library) {
  *module = module_of(library);
  return CUDA_SUCCESS;
}
STUB_API(cuLibraryGetGlobal)(CUdeviceptr* address, size_t* bytes, CUlibrary library, const char* name) {
  return stub::get_variable(module_of(library), name, address, bytes);
}
STUB_API(cuKernelGetFunction)(CUfunction* function, CUkernel kernel) {
  *function = function_of(kernel);
  return CUDA_SUCCESS;
}

STUB_API(cuFuncGetAttribute)(int* value, CUfunction_attribute attribute, CUfunction function) {
  const auto index = static_cast<size_t>(attribute);
  const int set = index < function->attributes.size() ? function->attributes[index] : 0;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = 10 * model().major + model().minor; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = set != 0 ? set : 49152; break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: *value = set != 0 ? set : -1; break;
    default: *value = set;
  }
  return CUDA_SUCCESS;
}
STUB_API(cuFuncSetAttribute)(CUfunction function, CUfunction_attribute attribute, int value) {
  if (!function->module->runs_here) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > model().shared_per_block) {
    stub::say("BAD", "%s asks for %d bytes of shared memory, of %d", function->name.c_str(), value, model().shared_per_block);
    return CUDA_ERROR_INVALID_VALUE;
  }
  const auto index = static_cast<size_t>(attribute);
  if (index < function->attributes.size()) function->attributes[index] = value;
  return CUDA_SUCCESS;
}
STUB_API(cuFuncSetCacheConfig)(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
STUB_API(cuKernelGetAttribute)(int* value, CUfunction_attribute attribute, CUkernel kernel, CUdevice) {
  return cuFuncGetAttribute(value, attribute, function_of(kernel));
}
STUB_API(cuKernelSetAttribute)(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice) {
  return cuFuncSetAttribute(function_of(kernel), attribute, value);
}

// Limited by threads and shared memory; registers are not known.
STUB_API(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)(int* blocks, CUfunction function, int threads, size_t shared, unsigned) {
  if (!function->module->runs_here) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  if (threads < 1 || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
  constexpr int kReserved = 1024;  // bytes of shared memory a block that the system takes
  const int by_threads = std::min(32, 2048 / ((threads + 31) / 32 * 32));
  const int by_memory = model().shared_per_multiprocessor / (static_cast<int>(shared) + kReserved);
  *blocks = std::min(by_threads, by_memory);
  return CUDA_SUCCESS;
}
STUB_API(cuOccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, CUfunction function, int threads, size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

STUB_API(cuTensorMapEncodeTiled)
(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = {};
  return CUDA_SUCCESS;
}

// For the stub of the runtime: a kernel that is registered at load. There are tens of thousands, so it is not looked up by name.
STUB_EXPORT CUkernel scm_stub_kernel(CUlibrary library, const char* name) {
  return reinterpret_cast<CUkernel>(new CUfunc_st{name, module_of(library)});
}
