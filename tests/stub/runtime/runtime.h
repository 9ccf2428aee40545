// libcudart on the stub's driver. NVIDIA's own runtime checks the driver and refuses one that is not NVIDIA's.
#pragma once

#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <cuda_runtime_api.h>

#define STUB_EXPORT extern "C" __attribute__((visibility("default")))
// A function of the runtime's interface that returns an error.
#define STUB_RUNTIME(name) STUB_EXPORT cudaError_t CUDARTAPI name

namespace stub {

// Make a device current in the calling thread if none is, as every call of the runtime does.
void initialize();
// Return a driver's result as the runtime's, and remember it for cudaGetLastError if it is an error.
cudaError_t result_of(CUresult result);
// The kernel or variable that a fat binary has registered for an address of the host's program. A cudaKernel_t is its own kernel; a variable that is not
// known has the address 0.
CUfunction kernel_of(const void* host);
CUdeviceptr variable_of(const void* host);

}  // namespace stub
