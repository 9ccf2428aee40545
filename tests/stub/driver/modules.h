// Modules and libraries: images of code, of which functions are asked for by name. The code is not looked at, only for which GPUs it is.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>

#include "log.h"

// The driver's opaque types. A CUlibrary is a CUmodule here, and a CUkernel a CUfunction.
struct CUfunc_st {
  std::string name;
  struct CUmod_st* module;
  std::array<int, 32> attributes{};  // by CUfunction_attribute
};
struct CUmod_st {
  bool runs_here = true;  // has code for the device's model
  std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
  std::map<std::string, CUdeviceptr> variables;
};

namespace stub {

CUmod_st* load_module(const void* image);
CUfunc_st* get_function(CUmod_st* module, const char* name);
// A function that stands for an operation of one of NVIDIA's libraries.
CUfunc_st* get_operation(const char* name);

// Whether an image has code for a compute capability: machine code for it or for an older minor version, or PTX for an older one. Images in formats other
// than nvcc's fat binaries are taken to have it.
bool has_code(const void* image, int major, int minor);

}  // namespace stub
