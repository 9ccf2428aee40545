// How programs find the driver's functions, and the names of errors.
#include <dlfcn.h>

#include <cstring>
#include <string>

#include "log.h"
#include "names.h"  // generated: kVersions and kErrors

namespace stub {
namespace {

// The function that stands for a name since the newest version of CUDA that is not newer than the asked one.
std::string versioned(const std::string& name, int version) {
  std::string chosen = name;
  int newest = -1;
  for (const Version& entry : kVersions) {
    if (name == entry.name && entry.since <= version && entry.since > newest) {
      chosen = entry.function;
      newest = entry.since;
    }
  }
  return chosen;
}

void* own_library() {
  static void* const handle = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&own_library), &info);
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  return handle;
}

}  // namespace
}  // namespace stub

STUB_API(cuGetProcAddress_v2)(const char* symbol, void** address, int version, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  std::string name = symbol;
  for (const char* suffix : {"_ptsz", "_ptds"}) {  // for the per-thread default stream
    if (name.size() > 5 && name.compare(name.size() - 5, 5, suffix) == 0) name.resize(name.size() - 5);
  }
  const std::string function = stub::versioned(name, version);
  *address = dlsym(stub::own_library(), function.c_str());
  if (stub::settings().trace) stub::say("address", "%s %d: %s%s", symbol, version, function.c_str(), *address == nullptr ? " NOT FOUND" : "");
  if (status != nullptr) *status = *address != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *address != nullptr ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
STUB_API(cuGetProcAddress)(const char* symbol, void** address, int version, cuuint64_t flags) {
  return cuGetProcAddress_v2(symbol, address, version, flags, nullptr);
}

STUB_API(cuGetErrorName)(CUresult error, const char** name) {
  *name = nullptr;
  for (const stub::Error& entry : stub::kErrors) {
    if (entry.code == error) *name = entry.name;
  }
  return *name != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
STUB_API(cuGetErrorString)(CUresult error, const char** text) {
  if (error == CUDA_ERROR_OUT_OF_MEMORY) {
    *text = "out of memory";
    return CUDA_SUCCESS;
  }
  if (error == CUDA_ERROR_NO_BINARY_FOR_GPU) {
    *text = "no kernel image is available for execution on the device";
    return CUDA_SUCCESS;
  }
  return cuGetErrorName(error, text);
}
