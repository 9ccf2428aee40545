#include "common/cuda.h"
#include "convolution/device.h"

namespace scm::convolution {
namespace {

const char* message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());  // a later cudaGetLastError() must not report this call
  return cudaGetErrorString(error);
}

}  // namespace

const char* read_device(Device& device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  device.capability = 10 * major + minor;
  return message(error);
}

void* thread_stream() { return cudaStreamPerThread; }

const char* clear(void* data, std::size_t bytes, void* stream) { return message(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream))); }

const char* synchronize(void* stream) { return message(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

}  // namespace scm::convolution
